"""Convolutional (and other) backbones of the package timm, as makers of feature maps."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from setemb.packages import require


class TimmBackbone(nn.Module):
    """The last feature map of a model of timm.

    Args:
        name: of the model, with its weights where there are several: ``resnet152.tv_in1k`` (torchvision's, ImageNet),
            ``resnext101_32x8d.fb_wsl_ig1b_ft_in1k`` (weakly supervised on a billion pictures).
        weights: "pretrained" (downloaded once by timm), "random", or a file with a state dict.

    Attributes:
        channels: of the feature map.
        mean, std: of the pictures that it was trained on, in [0, 1], a number a colour.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model; the weights cannot be had.
    """

    def __init__(self, name: str, weights: str = "pretrained") -> None:
        super().__init__()
        timm = require("timm", "pictures")
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('.')[0][:8]}*")[:5])
            raise ValueError(f"backbone must be a model of timm, got {name!r}" + (f"; near: {near}" if near else ""))
        overlay = None
        if weights not in ("pretrained", "random"):
            if not Path(weights).is_file():
                raise ValueError(f'weights must be "pretrained", "random" or a file, got {weights!r}')
            overlay = {"file": weights}
        try:  # with its classifier: without, timm takes any file for its weights
            network = timm.create_model(name, pretrained=weights != "random", pretrained_cfg_overlay=overlay)
        except Exception as error:  # no network, no such weights, another model's weights
            raise ValueError(f"backbone {name}: its weights ({weights}) cannot be had: {error}") from error
        network.reset_classifier(0)
        self.network = network
        self.channels = int(network.num_features)
        described = timm.get_pretrained_cfg(name, allow_unregistered=True)
        self.mean, self.std = tuple(described.mean), tuple(described.std)

    def forward(self, pictures: Tensor) -> Tensor:
        """``[B, 3, H, W]`` -> ``[B, channels, h, w]``."""
        (cells,) = self.network.forward_intermediates(
            pictures, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        result: Tensor = cells
        return result
