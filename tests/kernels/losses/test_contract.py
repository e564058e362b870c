"""What the losses over sets promise beside their numbers: tracing, autocast, errors, bounded memory, order."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from setemb_kernels import set_infonce_loss, set_sigmoid_loss, set_triplet_loss
from setemb_kernels.losses import tiles
from tests.kernels.losses.cases import LOSSES, with_gradients

FUNCTIONS = {
    "hardest": set_triplet_loss,
    "semi-hard": lambda x, y, **o: set_triplet_loss(x, y, negatives="semi-hard", **o),
    "all": lambda x, y, **o: set_triplet_loss(x, y, negatives="all", **o),
    "infonce": set_infonce_loss,
    "sigmoid": set_sigmoid_loss,
}


def sets(n: int, k: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = normalize(torch.randn(n, k, d, dtype=torch.float64, generator=generator), dim=-1)
    return v.to(dtype).requires_grad_()


GROUPS = {"x_group": torch.tensor([3, 3, 5, -1, 8, 9]), "y_group": torch.tensor([5, 3, 8, 3, 3, -1, 7])}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("options", [{}, GROUPS], ids=["diagonal", "groups"])
def test_gradcheck(name: str, options: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 4)
    loss = FUNCTIONS[name]
    alpha = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    arguments = (sets(6, 2, 5), sets(7, 3, 5, seed=1), alpha)
    assert torch.autograd.gradcheck(lambda x, y, a: loss(x, y, alpha=a, **options), arguments)


@pytest.mark.parametrize("name", ["temperature", "scale", "bias"])
def test_gradcheck_of_scalars(name: str) -> None:
    x, y = sets(6, 2, 5).detach(), sets(7, 3, 5, seed=1).detach()
    loss = set_infonce_loss if name == "temperature" else set_sigmoid_loss
    value = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: loss(x, y, **{name: v}, **GROUPS), (value,))


@pytest.mark.parametrize("kind", ["smooth_chamfer", "max", "mean", "match_probability"])
def test_opcheck(kind: str) -> None:
    x, y, alpha = sets(6, 2, 5), sets(7, 3, 5, seed=1), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    number = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    common = (x, y, alpha, number, None, torch.rand(7, 3) < 0.8, *GROUPS.values())
    ops = torch.ops.setemb
    torch.library.opcheck(ops.set_infonce_loss.default, (*common, number, kind, False, True))
    torch.library.opcheck(ops.set_sigmoid_loss.default, (*common, number, -number.detach(), kind, False))
    for negatives in ("hardest", "semi-hard", "all"):
        torch.library.opcheck(ops.set_triplet_loss.default, (*common, kind, False, 0.2, negatives))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile_full_graph_and_dynamic(name: str) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, y: Tensor, group: Tensor) -> Tensor:
        return 2 * FUNCTIONS[name](x, y, x_group=group, y_group=group)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 8, 13):
        group = torch.arange(n) // 2
        results = []
        for function in (loss, compiled):
            x, y = sets(n, 3, 16, torch.float32), sets(n, 2, 16, torch.float32, seed=1)
            value = function(x, y, group)
            value.backward()
            results.append((value.detach(), x.grad, y.grad))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast(name: str) -> None:
    x, y = sets(9, 3, 16, torch.float32), sets(9, 2, 16, torch.float32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = FUNCTIONS[name](x, y)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, FUNCTIONS[name](x.bfloat16(), y.bfloat16()))
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_second_derivative_raises() -> None:
    x, y = sets(6, 2, 5), sets(6, 3, 5, seed=1)
    (gradient,) = torch.autograd.grad(set_infonce_loss(x, y), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()


def test_states_have_no_gradient() -> None:
    x, y = sets(6, 2, 5), sets(6, 3, 5, seed=1)
    number = torch.tensor(0.7, dtype=torch.float64)
    _, rows, columns = torch.ops.setemb.set_infonce_loss(
        x, y, number, number, *(None,) * 4, number, "smooth_chamfer", False, True
    )
    assert torch.autograd.grad(rows.sum() + columns.sum(), (x, y), allow_unused=True) == (None, None)


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_rows_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 4)
    loss = LOSSES[name]
    arguments: dict[str, Any] = {"x": sets(6, 2, 5), "y": sets(7, 3, 5, seed=1), **GROUPS}
    arguments["alpha"] = torch.tensor(4.0, dtype=torch.float64)
    p, q = torch.tensor([4, 2, 0, 5, 3, 1]), torch.tensor([6, 1, 3, 0, 5, 2, 4])
    permuted = arguments | {"x": arguments["x"][p], "x_group": arguments["x_group"][p]}
    permuted |= {"y": arguments["y"][q], "y_group": arguments["y_group"][q]}
    one, other = (with_gradients(loss.run, a, loss.scalars) for a in (arguments, permuted))
    other |= {"x.grad": other["x.grad"][p.argsort()], "y.grad": other["y.grad"][q.argsort()]}
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 2, 1024])
def test_of_equal_negatives_the_first_wins(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    x = torch.ones(3, 1, 4)
    _, rows, columns = torch.ops.setemb.set_triplet_loss(
        *(x, x, torch.tensor(16.0), torch.tensor(0.0), None, None, None, None),
        *("smooth_chamfer", False, 0.2, "hardest"),
    )
    assert rows.tolist() == columns.tolist() == [1, 0, 0]


ERRORS: dict[str, tuple[Any, type[Exception], str, dict[str, Any]]] = {
    "one side's groups": (set_infonce_loss, ValueError, "y_group: expected ids", {"x_group": torch.arange(3)}),
    "groups of floats": (set_infonce_loss, TypeError, "x_group: expected integers", {"x_group": torch.ones(3)}),
    "groups of a wrong length": (
        set_infonce_loss,
        ValueError,
        r"x_group: expected shape \[3\] as of x, got \[4\]",
        {"x_group": torch.arange(4)},
    ),
    "margin": (set_triplet_loss, ValueError, "margin: expected a finite number >= 0, got -1", {"margin": -1}),
    "negatives": (set_triplet_loss, ValueError, "negatives: expected one of hardest", {"negatives": "easy"}),
    "temperature": (set_infonce_loss, ValueError, "temperature: expected a finite number > 0", {"temperature": 0}),
    "symmetric": (set_infonce_loss, TypeError, "symmetric: expected a bool, got int", {"symmetric": 1}),
    "scale": (set_sigmoid_loss, ValueError, "scale: expected a finite number > 0", {"scale": -1.0}),
    "bias": (set_sigmoid_loss, ValueError, "bias: expected a finite number, got inf", {"bias": float("inf")}),
    "bias of integers": (set_sigmoid_loss, TypeError, "bias: expected a floating", {"bias": torch.tensor(1)}),
    "features": (set_triplet_loss, ValueError, "y: expected 5 features", {"y": torch.ones(3, 2, 4)}),
    **{
        f"nested {side} of {loss.__name__}": (
            loss,
            TypeError,
            f"{side}: expected a padded tensor .*got a nested one: pad it, as torch.nested.to_padded_tensor does",
            {side: torch.nested.nested_tensor([torch.ones(2, 5)] * 3, layout=torch.jagged)},
        )
        for side in ("x", "y")
        for loss in (set_triplet_loss, set_infonce_loss, set_sigmoid_loss)
    },
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_got_and_expected(name: str) -> None:
    loss, error, message, change = ERRORS[name]
    arguments: dict[str, Any] = {"x": torch.ones(3, 2, 5), "y": torch.ones(3, 2, 5)} | change
    with pytest.raises(error, match=message):
        loss(arguments.pop("x"), arguments.pop("y"), **arguments)


MEMORY = """
import torch, sys
from setemb_kernels import set_infonce_loss, set_sigmoid_loss, set_triplet_loss
from benchmarks.memory import peak_beyond_inputs_and_results
loss = {"triplet": set_triplet_loss, "infonce": set_infonce_loss, "sigmoid": set_sigmoid_loss}[sys.argv[1]]
x, y = (torch.nn.functional.normalize(torch.randn(6144, 2, 8), dim=-1).requires_grad_() for _ in range(2))
step = lambda x, y: torch.autograd.grad(loss(x, y), (x, y))
step(x[:64], y[:64])
print(peak_beyond_inputs_and_results(lambda: step(x, y)))
"""


@pytest.mark.parametrize("name", ["triplet", "infonce", "sigmoid"])
def test_similarities_are_never_stored(name: str) -> None:
    """They would be 144 MiB here."""
    run = subprocess.run([sys.executable, "-c", MEMORY, name], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 96
