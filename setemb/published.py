"""Checkpoints of the published code (``ckpt.pth.tar``) as models of ours, without running anything that they hold.

Such a file is a pickle of the settings (``args``), the epoch, the best score and the weights (``model``); the words are
in a file of their own (``coco_butd_vocab.pkl``), a pickle of an object. Both are read by unpicklers that know a short
list of types and refuse everything else.

Source: https://github.com/kdwonn/DivE
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from setemb.config import ModelConfig
from setemb.data.vocab import Vocabulary
from setemb.model import SetEmbedder

HEADS = 4
"""The published attention has four heads, whatever the checkpoint says."""

SETS = {
    "residual_norm": "norm_global",
    "agg_block.latents": "slots",
    "agg_block.layers.0.0.fn.to_q": "attention.to_q",
    "agg_block.layers.0.0.fn.to_k": "attention.to_k",
    "agg_block.layers.0.0.fn.to_v": "attention.to_v",
    "agg_block.layers.0.0.fn.to_out.0": "attention.to_out",
    "agg_block.layers.0.0.norm_context": "norm_local",
    "agg_block.layers.0.0.norm": "norm_slots",
    "agg_block.layers.0.2.fn.net.0": "feedforward.0",
    "agg_block.layers.0.2.fn.net.3": "feedforward.3",
    "agg_block.layers.0.2.norm": "norm_feedforward",
    "agg_block.last_layer.0": "norm_last",
}
"""Names in the published set prediction module -> ours. All iterations share one layer, which is listed for each."""

NAMES = {
    **{f"img_enc.spm.{theirs}": f"image_sets.{ours}" for theirs, ours in SETS.items()},
    **{f"txt_enc.spm.{theirs}": f"text_sets.{ours}" for theirs, ours in SETS.items()},
    "img_enc.cnn": "image_encoder.backbone.network",
    "img_enc.fc": "image_encoder.fc",
    "img_enc.mlp.fc1": "image_encoder.mlp.fc1",
    "img_enc.mlp.bn.bn": "image_encoder.mlp.norm",
    "img_enc.mlp.fc2": "image_encoder.mlp.fc2",
    "txt_enc.embed": "text_encoder.embed",
    "txt_enc.rnn": "text_encoder.rnn",
    "txt_enc.bert": "text_encoder.model",
    "txt_enc.linear": "text_encoder.project",
}

BACKBONES = {"resnet152": "resnet152.tv_in1k", "resnext_wsl": "resnext101_32x8d.fb_wsl_ig1b_ft_in1k"}
"""Their ``cnn_type`` -> timm's name."""

POSITION = {"sine": "sine", "none": "none"}
"""Their ``spm_txt_pos_enc_type`` -> ours."""

IMAGE_POOLING = {"max": "max", "avg": "mean"}
"""Their ``img_res_pool`` -> ours."""

BERT_POOLING = {"max": "max", "cls": "first"}
"""Their ``txt_pooling`` next to BERT -> ours."""

GRU_POOLING = {"rnn": "last states"}
"""Their ``txt_pooling`` next to a GRU; ours has no other."""


def convert(
    checkpoint: str | Path, vocabulary: str | Path | None = None, source: str = "bert-base-uncased"
) -> SetEmbedder:
    """A published checkpoint as a `SetEmbedder` that gives the same numbers (``padding="dive"``), in evaluation mode.

    Args:
        checkpoint: ``ckpt.pth.tar`` or ``model_best.pth.tar``.
        vocabulary: ``*_vocab.pkl``, or JSON with ``word2idx``; for models with a GRU.
        source: of the language model, for models with BERT: a folder, a package, or a name that transformers knows.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds something other than tensors and settings, or weights of another
            architecture; naming it.
    """
    weights, settings = read_checkpoint(checkpoint)
    weights = _untied(weights, str(checkpoint))
    config = model_config(weights, settings, source, str(checkpoint))
    words = None
    if config.text.encoder == "bigru":
        if vocabulary is None:
            raise ValueError(f"{checkpoint} has a GRU: name its vocabulary as well (coco_butd_vocab.pkl)")
        words, order = read_vocabulary(vocabulary, len(weights["txt_enc.embed.weight"]))
        weights["txt_enc.embed.weight"] = weights["txt_enc.embed.weight"][order]
        config.text.vocab_size = len(words)
    model = SetEmbedder(config, words, pretrained=False)
    renamed, unknown = {}, []
    del weights["depth"]
    for name, tensor in weights.items():
        head = max((n for n in NAMES if name == n or name.startswith(f"{n}.")), key=len, default=None)
        if head is None:
            unknown.append(name)
        else:
            renamed[NAMES[head] + name.removeprefix(head)] = tensor
    if config.image.encoder == "pictures":  # the head lies inside the encoder of pictures
        renamed = {re.sub(r"^image_encoder\.(fc|mlp)", r"image_encoder.regions.\1", k): v for k, v in renamed.items()}
    if config.text.encoder == "transformer":  # a buffer that older releases of transformers stored
        renamed.pop("text_encoder.model.embeddings.position_ids", None)
    if unknown:
        raise ValueError(f"{checkpoint} holds weights of another architecture: {', '.join(unknown[:5])}")
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint} holds weights of another architecture: {reason}") from error
    return model.eval()


def model_config(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], source: str, where: str = "the checkpoint"
) -> ModelConfig:
    """Sizes from the shapes of the weights, the rest from their settings."""

    def setting(name: str, choices: Mapping[str, str]) -> str:
        if name not in settings:
            raise ValueError(f"{where} does not say {name!r} among its settings (args), which the model depends on")
        if settings[name] not in tuple(choices):
            raise ValueError(f"{where}: {name} must be one of {', '.join(choices)}, got {settings[name]!r}")
        return choices[settings[name]]

    backbone = any(name.startswith("img_enc.cnn.") for name in weights)
    query = "img_enc.spm.agg_block.layers.0.0.fn.to_q.weight"
    needed = ["img_enc.spm.agg_block.latents", "txt_enc.spm.agg_block.latents", "img_enc.mlp.fc1.weight", query]
    for name in needed if backbone else [*needed, "img_enc.fc.weight"]:
        if name not in weights:
            raise ValueError(f"{where} holds weights of another architecture: {name} is missing")
    slots, dim = weights["img_enc.spm.agg_block.latents"].shape
    others = weights["txt_enc.spm.agg_block.latents"].shape
    if (slots, dim) != tuple(others):
        raise ValueError(
            f"{where}: images have {slots} slots of {dim}, texts {others[0]} of {others[1]}: they must be as many"
        )
    alpha = settings.get("temperature")
    if not isinstance(alpha, (int, float)):
        raise ValueError(f"{where}: its settings (args) must hold a number 'temperature', got {alpha!r}")
    config = ModelConfig(dim=dim, alpha=float(alpha))
    config.sets.num_slots, config.sets.padding = slots, "dive"
    config.sets.iterations = int(weights["depth"])
    config.sets.dim_head = weights[query].shape[0] // HEADS
    config.image.hidden, config.image.dim_in = len(weights["img_enc.mlp.fc1.weight"]), 0
    config.image.pooling = setting("img_res_pool", IMAGE_POOLING)
    if backbone:
        config.image.encoder, config.image.backbone = "pictures", setting("cnn_type", BACKBONES)
    else:
        config.image.dim_in = weights["img_enc.fc.weight"].shape[1]
    config.text.position = setting("spm_txt_pos_enc_type", POSITION)
    if "txt_enc.embed.weight" in weights:
        config.text.dim_word = weights["txt_enc.embed.weight"].shape[1]
        config.text.tokenizer = "treebank"
        setting("txt_pooling", GRU_POOLING)
    else:
        config.text.encoder, config.text.source = "transformer", source
        config.text.pooling = setting("txt_pooling", BERT_POOLING)
    return config


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings of a published checkpoint, without running what it may hold besides."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise ValueError(f"{path} was cut short or is no checkpoint: {_first_line(error)}") from error
        raise ValueError(
            f"{path} holds more than tensors and settings: it asks for {wanted[1]}, which could run anything; refused"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} was cut short or is no checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} holds no weights under 'model'")
    weights = {str(name).removeprefix("module."): tensor for name, tensor in content["model"].items()}
    if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} holds something other than tensors under 'model'")
    settings = content.get("args")
    return weights, vars(settings) if isinstance(settings, argparse.Namespace) else dict(settings or {})


def read_vocabulary(path: str | Path, rows: int) -> tuple[Vocabulary, Tensor]:
    """The words, and for each of them the row of the published embedding, int64.

    The published code adds "<mask>" to what the file holds.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        if path.suffix == ".json":
            ids = json.loads(data)["word2idx"]
        else:
            ids = vars(_Words(io.BytesIO(data)).load())["word2idx"]
        ids = {str(word): int(number) for word, number in ids.items()}
    except RefusedError:
        raise ValueError(f"{path} holds more than words: it could run anything; refused") from None
    except Exception as error:  # whatever a damaged pickle raises
        raise ValueError(f"{path} was cut short or holds no vocabulary: {error!r}") from error
    ids.setdefault("<mask>", len(ids))
    if sorted(ids.values()) != list(range(rows)):
        raise ValueError(f"{path} holds {len(ids)} words, the checkpoint {rows}: it is the vocabulary of another")
    missing = [word for word in Vocabulary.SPECIAL if word not in ids]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    words = sorted((word for word in ids if word not in Vocabulary.SPECIAL), key=ids.__getitem__)
    result = Vocabulary(words, "treebank")
    return result, torch.tensor([ids[word] for word in result.words])


class RefusedError(Exception):
    """A pickle asks for something other than a vocabulary."""


class _Holder:
    """Stands in for the published class ``vocab.Vocabulary``; it has no method."""


class _Words(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "Vocabulary":
            return _Holder
        raise RefusedError(f"{module}.{name}")


def _untied(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights in which the layer that all iterations share stands once; ``depth`` is how often it stood."""
    result: dict[str, Tensor] = {}
    depths: dict[str, set[int]] = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"(.*\.agg_block\.layers\.)(\d+)(\..*)", name)
        if match is None:
            result[name] = tensor
            continue
        first = f"{match[1]}0{match[3]}"
        depths.setdefault(match[1], set()).add(int(match[2]))
        if not torch.equal(tensor, weights.get(first, tensor)):
            raise ValueError(f"{where}: {name} differs from {first}: the iterations share no weights")
        result[first] = weights.get(first, tensor)
    depth = max(map(len, depths.values()), default=0)
    if any(own != set(range(depth)) for own in depths.values()):
        found = "; ".join(f"{name}: {', '.join(map(str, sorted(own)))}" for name, own in depths.items())
        raise ValueError(f"{where}: images and texts must have as many iterations, numbered from 0; got layers {found}")
    result["depth"] = torch.tensor(depth)
    return result


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
