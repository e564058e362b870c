"""The losses as modules: the functions' values, parameters that learn, and the call of pytorch-metric-learning."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from setemb_kernels import set_infonce_loss, set_sigmoid_loss, set_triplet_loss
from setemb_kernels.integrations import MetricLearningLoss, SetInfoNCELoss, SetSigmoidLoss, SetTripletLoss
from tests.integrations.same import EXACT, flags, sets, with_gradients

X, Y = sets(6, 4, seed=1), sets(8, 3, seed=2)
GROUPS = {"x_group": torch.arange(6) // 2, "y_group": torch.arange(8) // 3}
MASKS = {"x_mask": flags(6, 4), "y_mask": flags(8, 3)}


@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (SetTripletLoss(), set_triplet_loss, {}),
        (
            SetTripletLoss(0.4, "semi-hard", 8.0),
            set_triplet_loss,
            {"margin": 0.4, "negatives": "semi-hard", "alpha": 8.0},
        ),
        (SetInfoNCELoss(), set_infonce_loss, {}),
        (SetInfoNCELoss(0.1, False, 8.0), set_infonce_loss, {"temperature": 0.1, "symmetric": False, "alpha": 8.0}),
        (SetTripletLoss(kind="max"), set_triplet_loss, {"kind": "max"}),
        (
            SetInfoNCELoss(0.2, kind="maxsim", reduction="mean"),
            set_infonce_loss,
            {"temperature": 0.2, "kind": "maxsim", "reduction": "mean"},
        ),
        (
            SetSigmoidLoss(alpha=5.0, kind="match_probability", match_bias=-1.0).double(),
            set_sigmoid_loss,
            {"alpha": 5.0, "kind": "match_probability", "match_bias": -1.0},
        ),
        (SetSigmoidLoss().double(), set_sigmoid_loss, {}),
        (SetSigmoidLoss(3.0, -2.0, 8.0).double(), set_sigmoid_loss, {"scale": 3.0, "bias": -2.0, "alpha": 8.0}),
    ],
)
def test_values_and_gradients(module: Any, function: Any, options: dict[str, Any]) -> None:
    theirs = with_gradients(lambda x, y: function(x, y, **GROUPS, **MASKS, **options), X, Y)
    ours = with_gradients(lambda x, y: module(x, y, *GROUPS.values(), **MASKS), X, Y)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)  # a scale is the exponential of its logarithm
    torch.testing.assert_close(module(X, Y[:6]), function(X, Y[:6], **options), rtol=1e-6, atol=1e-8)


def test_parameters_learn_and_are_kept() -> None:
    for module, names in (
        (SetInfoNCELoss(learnable=True), {"log_temperature"}),
        (SetSigmoidLoss(), {"log_scale", "bias"}),
    ):
        assert {name for name, _ in module.named_parameters()} == names == set(module.state_dict())
        module(X.float(), Y[:6].float()).backward()
        assert all(p.grad is not None and p.grad.isfinite() and p.grad != 0 for p in module.parameters())
    assert not list(SetInfoNCELoss().parameters())
    fixed = SetSigmoidLoss(learnable=False)
    assert set(fixed.state_dict()) == {"log_scale", "bias"} and not any(p.requires_grad for p in fixed.parameters())
    assert "temperature=0.05" in repr(SetInfoNCELoss()) and "negatives=hardest" in repr(SetTripletLoss())


@pytest.mark.parametrize("module", [SetTripletLoss, SetInfoNCELoss, SetSigmoidLoss])
def test_numbers_of_the_similarity_may_be_parameters(module: Any) -> None:
    alpha, bias = (torch.nn.Parameter(torch.tensor(v)) for v in (5.0, -1.0))
    loss = module(kind="match_probability", alpha=alpha, match_bias=bias)
    assert {"alpha", "match_bias"} <= set(loss.state_dict())
    assert loss.alpha is alpha and loss.match_bias is bias and {id(alpha), id(bias)} <= set(map(id, loss.parameters()))
    MetricLearningLoss(loss)(X.float(), ref_emb=Y[:6].float()).backward()
    assert all(p.grad is not None and p.grad != 0 for p in (alpha, bias))
    assert "match_bias=-1.0" in repr(loss)


def test_a_temperature_that_is_a_parameter() -> None:
    given = torch.nn.Parameter(torch.tensor(0.1))
    assert [*SetInfoNCELoss(given).parameters()] == [given]
    assert set(SetInfoNCELoss(given, learnable=True).state_dict()) == {"log_temperature"}


POSITIVE = "expected a finite number > 0"
WRONG: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    *((SetInfoNCELoss, {"temperature": v}, ValueError, f"temperature: {POSITIVE}") for v in (0.0, -1.0, math.inf)),
    *(
        (SetInfoNCELoss, {"temperature": v, "learnable": True}, ValueError, f"temperature: {POSITIVE}")
        for v in (0.0, math.nan, torch.tensor(-1.0))
    ),
    *((SetSigmoidLoss, {"scale": v}, ValueError, f"scale: {POSITIVE}") for v in (0.0, -1.0, math.inf, math.nan)),
    (SetInfoNCELoss, {"temperature": "1"}, TypeError, "temperature: expected a number"),
    (SetInfoNCELoss, {"symmetric": 1}, TypeError, "symmetric: expected a bool, got int"),
    (SetInfoNCELoss, {"learnable": "no"}, TypeError, "learnable: expected a bool, got str"),
    (SetSigmoidLoss, {"learnable": None}, TypeError, "learnable: expected a bool, got NoneType"),
    (SetSigmoidLoss, {"bias": math.inf}, ValueError, "bias: expected a finite number, got inf"),
    (SetTripletLoss, {"margin": -0.1}, ValueError, "margin: expected a finite number >= 0, got -0.1"),
    (SetTripletLoss, {"margin": "wide"}, TypeError, "margin: expected a number, got str"),
    (SetTripletLoss, {"negatives": "hard"}, ValueError, "negatives: expected one of hardest, semi-hard, all, got"),
    (SetTripletLoss, {"kind": "nearest"}, ValueError, "kind: expected one of"),
    (SetTripletLoss, {"alpha": 0.0}, ValueError, f"alpha: {POSITIVE}"),
    (SetInfoNCELoss, {"match_bias": math.nan}, ValueError, "match_bias: expected a finite number"),
    (SetInfoNCELoss, {"kind": "chamfer", "reduction": "mean"}, ValueError, "reduction: expected 'sum' for chamfer"),
    (SetTripletLoss, {"knd": "max"}, TypeError, "knd: not an argument of SetTripletLoss, which takes kind, match_bias"),
]


@pytest.mark.parametrize(("module", "options", "error", "message"), WRONG)
def test_wrong_options_are_said_at_once(module: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        module(**options)


def test_metric_learning_call() -> None:
    loss = MetricLearningLoss(SetTripletLoss())
    ours = loss(X, GROUPS["x_group"], ref_emb=Y, ref_labels=GROUPS["y_group"])
    torch.testing.assert_close(ours, set_triplet_loss(X, Y, **GROUPS), **EXACT)
    torch.testing.assert_close(loss(X, ref_emb=Y[:6]), set_triplet_loss(X, Y[:6]), **EXACT)
    with pytest.raises(ValueError, match="ref_emb: expected the sets to compare with"):
        loss(X, GROUPS["x_group"])
    with pytest.raises(ValueError, match="indices_tuple: expected None"):
        loss(X, GROUPS["x_group"], (torch.zeros(1),) * 3, Y, GROUPS["y_group"])
    with pytest.raises(ValueError, match="y_group: expected ids"):
        loss(X, GROUPS["x_group"], ref_emb=Y)


@pytest.mark.parametrize("kind", ["smooth_chamfer", "maxsim"])
def test_like_the_package_for_sets_of_one_vector(kind: Any) -> None:
    """The two calls of docs/integrations.md, as they stand there."""
    losses: Any = pytest.importorskip("pytorch_metric_learning.losses")
    document = Path(__file__).parents[2] / "docs" / "integrations.md"
    (row,) = (line for line in document.read_text().splitlines() if line.startswith("| pytorch-metric-learning |"))
    their_call, our_call = re.findall(r"`([^`]*)`", row)[:2]
    names = {
        "NTXentLoss": losses.NTXentLoss,
        "MetricLearningLoss": MetricLearningLoss,
        "SetInfoNCELoss": partial(SetInfoNCELoss, kind=kind),
        "labels": GROUPS["x_group"],
        "ids": GROUPS["y_group"],
    }
    x, y = 3 * sets(6, 1, seed=1), 2 * sets(8, 1, seed=2)
    truth = with_gradients(lambda x, y: eval(their_call, names | {"x": x[:, 0], "y": y[:, 0]}), x, y)
    unit = partial(torch.nn.functional.normalize, dim=-1)  # it compares cosines, also in its gradients
    got = with_gradients(lambda x, y: eval(our_call, names | {"x": unit(x), "y": unit(y)}), x, y)
    torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-8)
