"""A stand-in for timm, which imports torchvision; see `tests.model.test_pictures`."""

from __future__ import annotations

import sys
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
