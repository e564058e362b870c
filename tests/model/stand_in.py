"""Stand-ins for timm and open_clip, which import torchvision; see `tests.model.test_pictures`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn


class StandIn:
    """What is used of timm, with one small model."""

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []

    def is_model(self, name: str) -> bool:
        return name.split(".")[0] == "tiny"

    def list_models(self, pattern: str) -> list[str]:
        return ["tiny"] if pattern.startswith("*tiny") else []

    def get_pretrained_cfg(self, name: str, allow_unregistered: bool) -> SimpleNamespace:
        return SimpleNamespace(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))

    def create_model(self, name: str, **options: object) -> nn.Module:
        self.calls.append(options)
        if options["pretrained"] and options["pretrained_cfg_overlay"] is None:
            raise OSError("no network")
        network = TinyNetwork()
        if options["pretrained"]:
            network.load_state_dict(torch.load(options["pretrained_cfg_overlay"]["file"], weights_only=True))
        return network


class TinyNetwork(nn.Module):
    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.BatchNorm2d(8)
        self.classifier: nn.Module = nn.Linear(8, 10)

    def reset_classifier(self, classes: int) -> None:
        assert classes == 0
        self.classifier = nn.Identity()

    def forward_intermediates(self, x: torch.Tensor, indices: int, intermediates_only: bool, **options: object):
        assert indices == 1 and intermediates_only and options == {"norm": True, "output_fmt": "NCHW"}
        return [self.norm(self.conv(x))]


@pytest.fixture
def timm(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    return stand_in


class OpenClipStandIn:
    """What is used of open_clip 3, with one small model that has a tag."""

    def __init__(self, folder: Path) -> None:
        self.calls: list[dict[str, object]] = []
        self.tag = folder / "tag.pt"
        torch.save(TinyClip(16).state_dict(), self.tag)

    def list_models(self) -> list[str]:
        return ["tiny-clip", "tiny-clip-hf"]

    def list_pretrained_tags_by_model(self, name: str) -> list[str]:
        return ["small_s1"] if name == "tiny-clip" else []

    def create_model(
        self,
        model_name: str,
        pretrained: str | None = None,
        load_weights: bool = True,
        force_custom_text: bool = False,
        force_image_size: int | None = None,
        pretrained_text: bool = True,
    ) -> nn.Module:
        self.calls.append({"name": model_name, "pretrained": pretrained, "load_weights": load_weights})
        assert force_custom_text and load_weights == pretrained_text == (pretrained is not None)
        model = TinyClip(force_image_size or 16)
        if model_name == "tiny-clip-hf":
            model.text = nn.Linear(1, 1)
        if pretrained is not None:
            model.load_state_dict(torch.load(self.tag if pretrained == "small_s1" else pretrained, weights_only=True))
        return model

    def get_tokenizer(self, name: str) -> TinyTokenizer:
        return TinyTokenizer()

    def get_model_preprocess_cfg(self, model: nn.Module) -> dict[str, object]:
        return {"size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5], "interpolation": "bicubic"}


class TinyTokenizer:
    """As CLIP's: 1 to 97 are letters and others, 98 starts a text, 99 ends it, zeros follow."""

    context_length, sot_token_id, eot_token_id = 24, 98, 99

    def __call__(self, texts: list[str]) -> torch.Tensor:
        result = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(result, texts, strict=True):
            ids = [98, *(ord(c) % 97 + 1 for c in text), 99][: self.context_length]
            ids[-1] = 99
            row[: len(ids)] = torch.tensor(ids)
        return result


class TinyClip(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.visual, self.text = TinyVision(size), TinyText()
        self.logit_scale = nn.Parameter(torch.tensor(1.0))


class TinyVision(nn.Module):
    """Patches of 4 x 4 pixels and a class token, which one layer mixes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.image_size = (size, size)
        self.conv1 = nn.Conv2d(3, 12, 4, 4, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(12))
        self.positional_embedding = nn.Parameter(0.1 * torch.randn((size // 4) ** 2 + 1, 12))
        self.layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
        self.ln_post = nn.LayerNorm(12)
        self.proj = nn.Parameter(torch.randn(12, 10))

    def forward_intermediates(
        self, x: torch.Tensor, indices: int, normalize_intermediates: bool = False
    ) -> dict[str, object]:
        assert indices == 1 and normalize_intermediates
        patches = self.conv1(x)
        tokens = torch.cat([self.class_embedding.expand(len(x), 1, -1), patches.flatten(2).mT], 1)
        tokens = self.ln_post(self.layer(tokens + self.positional_embedding))
        cells = tokens[:, 1:].mT.unflatten(2, patches.shape[2:]).contiguous()
        return {"image_intermediates": [cells], "image_features": tokens[:, 0] @ self.proj}


class TinyText(nn.Module):
    """Of its full length alone, as open_clip's mask is; the vector of a text is where its largest number stands."""

    context_length, vocab_size = TinyTokenizer.context_length, 100

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(100, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
        self.ln_final = nn.LayerNorm(6)
        self.text_projection = nn.Parameter(torch.randn(6, 10))
        mask = torch.full((self.context_length, self.context_length), -torch.inf).triu(1)
        self.register_buffer("attn_mask", mask, persistent=False)

    def forward_intermediates(
        self, text: torch.Tensor, indices: int, normalize_intermediates: bool, output_fmt: str
    ) -> dict[str, object]:
        assert indices == 1 and normalize_intermediates and output_fmt == "NLC"
        states = self.ln_final(self.layer(self.token_embedding(text), src_mask=self.attn_mask))
        pooled = states[torch.arange(len(text)), text.argmax(1)] @ self.text_projection
        return {"text_intermediates": [states], "text_features": pooled}


@pytest.fixture
def open_clip(monkeypatch, tmp_path_factory) -> OpenClipStandIn:
    stand_in = OpenClipStandIn(tmp_path_factory.mktemp("open_clip"))
    monkeypatch.setitem(sys.modules, "open_clip", stand_in)
    return stand_in
