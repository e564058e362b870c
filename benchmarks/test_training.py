"""Rows of a whole step of training, optimizer included: ours beside the same written plainly in PyTorch.

The published recipe on regions (36 of 2048 features an image, BiGRU, D = 1024, 4 slots, 4 iterations; the hardest
negatives, both regularisers) with 128 images and five captions of each, as long as those of COCO.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.harness import ROWS, Row, measure
from benchmarks.memory import in_a_process_of_its_own
from benchmarks.peers import PlainEmbedder
from setemb.config import Config, load_config
from setemb.model import SetEmbedder
from setemb.modules import SetOutput
from setemb.objective import training_loss
from setemb.training import adamw

OP = "training"
SIZE = "step B128 x 5 captions, regions 36 x 2048, BiGRU, D1024 K4 x4"
WORDS = 10_000
EPOCHS_DONE = 9.0
"""The warm-up is over."""


def recipe(*overrides: str) -> Config:
    config = load_config("coco-region-bigru", list(overrides))
    config.model.image.dim_in, config.model.text.vocab_size = config.model.image.dim_in or 2048, WORDS
    return config


def random_batch(images: int, regions: int = 36, features: int = 2048) -> dict[str, Tensor]:
    """Images with five captions each, of 8 to 25 words, 12 or 13 as a rule: those of COCO, with start and end."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.normal(12.5, 2.5, (5 * images,), generator=generator).round().long().clamp(8, 25)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return {
        "images": torch.randn(images, regions, features, generator=generator).relu(),
        "texts": torch.randint(4, WORDS, mask.shape, generator=generator) * mask,
        "text_mask": mask,
        "image_group": torch.arange(images),
        "caption_group": torch.arange(images).repeat_interleave(5),
    }


class Step:
    """Forward, backward, clipping and the optimizer, of ours or of the plain model, from the same weights."""

    def __init__(self, config: Config, plain: bool, bfloat16: bool = False) -> None:
        torch.manual_seed(0)
        self.config, self.bfloat16 = config, bfloat16
        ours = SetEmbedder(config.model).train()
        self.model: nn.Module = PlainEmbedder(ours).train() if plain else ours
        self.optimizer: torch.optim.Optimizer
        if plain:
            o = config.optimizer
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=o.lr, weight_decay=o.weight_decay)
        else:
            self.optimizer = adamw(ours, config.optimizer)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16, cache_enabled=False)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        model, config = self.model, self.config.loss
        with self.autocast():
            if isinstance(model, PlainEmbedder):
                return model.loss(batch, config)
            assert isinstance(model, SetEmbedder)
            images, texts = model.encode_image(batch), model.encode_text(batch)
            return training_loss(model, images, texts, batch, config, EPOCHS_DONE)[0]

    def __call__(self, batch: dict[str, Tensor]) -> list[Tensor]:
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        return self.update()

    def update(self) -> list[Tensor]:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.trainer.gradient_clip)
        self.optimizer.step()
        return [p.grad for p in self.model.parameters() if p.grad is not None]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
    shares = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, share in zip(layers, shares, strict=True):
            layer.p = share


def assert_the_same_loss(*steps: Step) -> None:
    losses = []
    for step in steps:
        with without_dropout(step.model), torch.no_grad():
            losses.append(step.loss(random_batch(16)))
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-4, atol=2e-4)


def test_step_float32(benchmark: BenchmarkFixture) -> None:
    config, batch = recipe(), random_batch(128)
    ours, plain = Step(config, plain=False), Step(config, plain=True)
    assert_the_same_loss(ours, plain)
    row = Row(OP, f"{SIZE}, float32", 1 / 1.5, "plain PyTorch")
    measure(benchmark, row, lambda: ours(batch), lambda: plain(batch), {}, operations=0.0, rounds=3)


def test_step_bfloat16(benchmark: BenchmarkFixture) -> None:
    config, batch = recipe(), random_batch(128)
    ours, single, plain = Step(config, False, bfloat16=True), Step(config, False), Step(config, True, bfloat16=True)
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    row = Row(OP, f"{SIZE}, bfloat16", 1 / 1.5 if instructions else None, "ours in float32")
    peers = {"eager": lambda: plain(batch)}
    options = {"operations": 0.0, "rounds": 2, "peer_rounds": 1}
    measure(benchmark, row, lambda: ours(batch), lambda: single(batch), peers, **options)  # type: ignore[arg-type]


MEMORY = """
import sys
from benchmarks.memory import peak_beyond_inputs_and_results
from benchmarks.test_training import Step, random_batch, recipe
step, batch = Step(recipe(), plain=sys.argv[1] == "plain", bfloat16=sys.argv[2] == "bfloat16"), random_batch(128)
step(random_batch(2))
step.optimizer.zero_grad()
print(peak_beyond_inputs_and_results(lambda: step(batch)))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_peak_memory(dtype: str) -> None:
    plain, ours = (Row(OP, f"peak memory of a step, {dtype}, {whose}", None, "") for whose in ("plain PyTorch", "ours"))
    plain.memory_mib = in_a_process_of_its_own(MEMORY, "plain", dtype)
    ours.memory_mib, ours.limit_mib = in_a_process_of_its_own(MEMORY, "ours", dtype), plain.memory_mib / 2
    ROWS.extend((plain, ours))


def sections(step: Step, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Milliseconds of each part of a step of ours: forward and backward, cut at detached tensors."""
    model, times = step.model, {}
    assert isinstance(model, SetEmbedder)
    graph: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def part(name: str, function: Callable[[], Any]) -> list[Tensor]:
        start = time.perf_counter()
        with step.autocast():
            out = function()
        times[name] = {"forward": (time.perf_counter() - start) * 1e3}
        made = [t for t in out if isinstance(t, Tensor) and t.requires_grad]
        cut = [t.detach().requires_grad_() for t in made]
        graph.append((name, made, cut))
        return cut

    step.optimizer.zero_grad()
    mask = batch["text_mask"]
    regions = part("image encoder", lambda: model.image_encoder(batch["images"])[:2])
    images = part("image sets", lambda: model.image_sets(*regions)[:2])
    words = part("text encoder", lambda: model.text_encoder(batch["texts"], mask)[:2])
    texts = part("text sets", lambda: model.text_sets(*words, mask)[:2])

    def loss() -> list[Tensor]:
        return [training_loss(model, SetOutput(*images), SetOutput(*texts), batch, step.config.loss, EPOCHS_DONE)[0]]

    (value,) = part("loss", loss)
    value.grad = torch.ones_like(value)
    for name, made, cut in reversed(graph):
        start = time.perf_counter()
        torch.autograd.backward(made, [t.grad for t in cut])
        times[name]["backward"] = (time.perf_counter() - start) * 1e3
    start = time.perf_counter()
    step.update()
    times["clipping and optimizer"] = {"update": (time.perf_counter() - start) * 1e3}
    return times


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_the_time_goes(dtype: str) -> None:
    step, batch = Step(recipe(), plain=False, bfloat16=dtype == "bfloat16"), random_batch(128)
    step(batch)
    row = Row(OP, f"where our step spends its time, {dtype}", None, "")
    row.sections = sections(step, batch)
    ROWS.append(row)
