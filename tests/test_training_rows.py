"""The step of training that is measured: ours and the plain one have one loss, its gradients, and parts that add up."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("omegaconf")
pytest.importorskip("pytest_benchmark")

from benchmarks.test_training import Step, random_batch, recipe, sections, without_dropout

SMALL = ["model.dim=32", "model.image.dim_in=24", "model.text.dim_word=12", "model.sets.dim_head=16"]
SMALL += ["loss.mmd=1", "loss.diversity=1"]


def test_both_steps_have_the_same_loss_and_gradients() -> None:
    config, batch = recipe(*SMALL), random_batch(12, 9, 24)
    losses, gradients = [], []
    for plain in (False, True):
        step = Step(config, plain)
        step.model.double()  # no float32, whose rounding would choose another of two negatives that are nearly alike
        with without_dropout(step.model):
            loss = step.loss({k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
            loss.backward()
        losses.append(loss.detach())
        parameters = step.model.named_parameters()
        gradients.append({name.replace(".parts.", "."): p.grad for name, p in parameters if p.grad is not None})
    torch.testing.assert_close(losses[0].double(), losses[1].double(), rtol=1e-5, atol=1e-6)
    assert list(gradients[0]) == list(gradients[1])
    for name, ours in gradients[0].items():
        error = (ours - gradients[1][name]).norm() / (gradients[1][name].norm() + 1e-6)
        assert error < 1e-3, name


def test_the_parts_of_a_step_are_the_step() -> None:
    config, batch = recipe(*SMALL), random_batch(6, 9, 24)
    whole, cut = Step(config, plain=False), Step(config, plain=False)
    with without_dropout(whole.model), without_dropout(cut.model):
        expected = whole(batch)
        times = sections(cut, batch)
    for ours, theirs in zip((p.grad for p in cut.model.parameters() if p.grad is not None), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert set(times) == {
        "image encoder",
        "image sets",
        "text encoder",
        "text sets",
        "loss",
        "clipping and optimizer",
    }
