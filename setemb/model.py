"""`SetEmbedder`: encoders and set prediction modules of both modalities, and the similarity of their sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from setemb.config import ModelConfig
from setemb.inputs import Picture, image_batch, text_batch
from setemb.modules import (
    FeatureTextEncoder,
    GRUTextEncoder,
    OpenClipTextEncoder,
    PictureEncoder,
    PIENet,
    RegionEncoder,
    SetOutput,
    SetPrediction,
    TransformerTextEncoder,
)
from setemb.similarity import Similarity, set_similarity
from setemb_kernels import __version__

if TYPE_CHECKING:
    from setemb.data.vocab import Vocabulary

FORMAT = 1
"""Of the folder that `SetEmbedder.save_pretrained` writes."""

Batch = Mapping[str, Tensor]
"""A batch of images and captions.

=============== ====================================== =====================================================
key             shape                                  what
=============== ====================================== =====================================================
images          float ``[B, T, dim_in]``               region or grid features;
                uint8 ``[B, 3, H, W]``                 pictures, for a model with a backbone inside
image_mask      bool ``[B, T]``                        True = valid; may be absent
texts           int64 ``[C, T]``, float ``[C, T, d]``  word ids; token features for the text encoder "features"
text_mask       bool ``[C, T]``                        True = valid
image_group     int64 ``[B]``                          image and caption of one group are a positive pair
caption_group   int64 ``[C]``
positive        bool ``[B, C]``                        the positive pairs, where groups do not say it; may be absent
=============== ====================================== =====================================================
"""


class SetEmbedder(nn.Module):
    """Embeds images and texts as sets of vectors that can be compared.

    Args:
        config: sizes that are 0 ("as the data has") must have been filled in.
        vocabulary: of the text encoder "bigru"; it is saved and loaded with the model.
        pretrained: read weights of backbone and language model; without, whoever calls loads them.

    Raises:
        ValueError: naming the setting.
        ImportError: an encoder needs a package; naming it.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary | None = None, pretrained: bool = True) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        text = config.text
        if config.similarity == "cosine" and config.sets.num_slots != 1:
            raise ValueError(f'similarity "cosine" needs sets.num_slots = 1, got {config.sets.num_slots}')
        self.image_encoder = _image_encoder(config, pretrained)
        self.text_encoder = _text_encoder(config, pretrained)
        self.image_sets = _set_prediction(config, self.image_encoder, None)
        self.text_sets = _set_prediction(config, self.text_encoder, None if text.position == "none" else text.position)
        if config.similarity == "match_probability":
            self.match_scale = nn.Parameter(torch.tensor(float(config.match_scale)))
            self.match_bias = nn.Parameter(torch.tensor(float(config.match_bias)))

    def encode_image(self, images: Batch | Picture | Sequence[Picture], return_attention: bool = False) -> SetOutput:
        """Sets of images.

        Args:
            images: a batch (keys ``images`` and ``image_mask``), or one picture or several: files, Pillow images, uint8
                ``[H, W, 3]``, or features ``[T, dim_in]`` (see `setemb.inputs`). These are encoded in evaluation mode,
                without gradients.
        """
        if not isinstance(images, Mapping):
            with self._asked():
                return self.encode_image(image_batch(self, images), return_attention)
        local, global_, mask = self.image_encoder(images["images"], images.get("image_mask"))
        output: SetOutput = self.image_sets(local, global_, mask, return_attention)
        return output

    def encode_text(self, texts: Batch | str | Sequence[str], return_attention: bool = False) -> SetOutput:
        """Sets of texts.

        Args:
            texts: a batch (keys ``texts`` and ``text_mask``), or one text or several, which are encoded in evaluation
                mode, without gradients: ``index.search(model.encode_text("a dog"))``.
        """
        if not isinstance(texts, Mapping):
            with self._asked():
                return self.encode_text(text_batch(self, texts), return_attention)
        local, global_, mask = self.text_encoder(texts["texts"], texts["text_mask"])
        output: SetOutput = self.text_sets(local, global_, mask, return_attention)
        return output

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Evaluation mode, without gradients."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module, training in modes:
                module.training = training

    def similarity(self, x: Tensor | SetOutput, y: Tensor | SetOutput) -> Tensor:
        """``[N, K, D]`` and ``[M, L, D]`` (or what the encode methods return) -> ``[N, M]``; see `set_similarity`."""
        x = x.embeddings if isinstance(x, SetOutput) else x
        y = y.embeddings if isinstance(y, SetOutput) else y
        learnt = {}
        if self.config.similarity == "match_probability":
            learnt = {"scale": self.match_scale, "bias": self.match_bias}
        return set_similarity(x, y, cast(Similarity, self.config.similarity), self.config.alpha, **learnt)

    def measure(self) -> dict[str, Any]:
        """The same as arguments of `setemb_kernels.set_infonce_loss`, `set_topk` and their like."""
        kind = self.config.similarity
        if kind == "match_probability":
            return {"kind": kind, "alpha": self.match_scale, "match_bias": self.match_bias}
        # of sets of one vector smooth_chamfer is the cosine
        return {"kind": "smooth_chamfer" if kind == "cosine" else kind, "alpha": self.config.alpha}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json``, ``model.safetensors`` and, with a vocabulary, ``vocab.txt``.

        Each is written beside and renamed; the configuration, which holds the checksums, comes last.
        """
        from setemb.checkpoint import weights_to_bytes, write_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"model.safetensors": weights_to_bytes(self.state_dict())}
        if self.vocabulary is not None:
            files["vocab.txt"] = self.vocabulary.to_text().encode()
        for name, data in files.items():
            write_file(folder / name, data)
        description = {
            "format": FORMAT,
            "setemb": __version__,
            "model": asdict(self.config),
            "files": {name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in files.items()},
        }
        write_file(folder / "config.json", (json.dumps(description, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SetEmbedder:
        """The model that `save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file was cut short or altered, or is of another format; naming the file.
        """
        from safetensors.torch import load

        from setemb.config import from_dict
        from setemb.data.vocab import Vocabulary

        folder = Path(folder)
        path = folder / "config.json"
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            found, settings, listed = description["format"], description["model"], description["files"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the description of a saved model: {error!r}") from error
        if found != FORMAT:
            raise ValueError(f"{path} has format {found!r}, expected {FORMAT}")
        contents = {name: _verified(folder / name, entry) for name, entry in listed.items()}
        config, vocabulary = from_dict(ModelConfig, settings), None
        if "vocab.txt" in contents:
            vocabulary = Vocabulary.from_text(contents["vocab.txt"].decode(), config.text.tokenizer)
        model = cls(config, vocabulary, pretrained=False)
        try:
            model.load_state_dict(load(contents["model.safetensors"]))
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{folder}: the weights do not fit {path.name}: {error}") from error
        return model.eval()


def _verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    data = path.read_bytes()
    if len(data) != entry["bytes"]:
        raise ValueError(f"{path} was cut short or altered: {len(data)} bytes, expected {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path} was altered: its checksum is not the one in config.json")
    return data


def _image_encoder(config: ModelConfig, pretrained: bool) -> RegionEncoder | PictureEncoder:
    image = config.image
    head: dict[str, Any] = {
        "hidden": image.hidden or None,
        "dropout": image.dropout,
        "input_dropout": image.input_dropout,
        "pooling": image.pooling,
    }
    if image.takes == "pictures":
        from setemb.modules.backbones import TimmBackbone
        from setemb.modules.open_clip import OpenClipBackbone

        weights = image.weights if pretrained else "random"
        backbone: TimmBackbone | OpenClipBackbone
        if image.encoder == "open_clip":
            backbone = OpenClipBackbone(image.backbone, weights, image.picture_size)
        else:
            backbone = TimmBackbone(image.backbone, weights)
        return PictureEncoder(
            backbone,
            backbone.channels,
            config.dim,
            image.frozen,
            mean=backbone.mean,
            std=backbone.std,
            cell_drop=image.cell_drop,
            pooled=getattr(backbone, "pooled", 0),
            **head,
        )
    if image.dim_in < 1:
        raise ValueError(f"image.dim_in must be at least 1, got {image.dim_in}")
    return RegionEncoder(image.dim_in, config.dim, **head)


def _text_encoder(
    config: ModelConfig, pretrained: bool
) -> GRUTextEncoder | FeatureTextEncoder | TransformerTextEncoder | OpenClipTextEncoder:
    text = config.text
    if text.encoder == "bigru":
        if text.vocab_size < 1:
            raise ValueError(f"text.vocab_size must be at least 1, got {text.vocab_size}")
        return GRUTextEncoder(text.vocab_size, config.dim, text.dim_word, text.dropout)
    if text.encoder == "features":
        if text.pooling == "first":
            raise ValueError('text.pooling "first" is for the text encoder "transformer" alone, got it for "features"')
        if text.dim_in < 1:
            raise ValueError(f"text.dim_in must be at least 1, got {text.dim_in}")
        return FeatureTextEncoder(
            text.dim_in, config.dim, text.hidden or None, text.dropout, text.input_dropout, cast(Any, text.pooling)
        )
    if text.encoder == "open_clip":
        weights = text.weights if pretrained else "random"
        return OpenClipTextEncoder(text.source, config.dim, weights, text.frozen, text.dropout)
    return TransformerTextEncoder(
        text.source, config.dim, text.frozen, text.dropout, cast(Any, text.pooling), pretrained
    )


def _set_prediction(config: ModelConfig, encoder: Any, position: Any) -> SetPrediction | PIENet:
    sets = config.sets
    if sets.kind == "pie_net":
        return PIENet(encoder.dim_local, encoder.dim_global, config.dim, sets.num_slots, sets.dropout)
    return SetPrediction(
        encoder.dim_local,
        encoder.dim_global,
        config.dim,
        sets.num_slots,
        sets.iterations,
        sets.heads,
        sets.dim_head,
        sets.dropout,
        position,
        cast(Any, sets.padding),
    )
