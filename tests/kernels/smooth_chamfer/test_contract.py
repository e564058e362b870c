"""What smooth_chamfer promises beside its numbers: tracing, autocast, errors, bounded memory, published results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from setemb_kernels import smooth_chamfer

PUBLISHED = np.load(Path(__file__).parents[2] / "data" / "published_similarity.npz")


def sets(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return (
        torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        .to(dtype)
        .requires_grad_()
    )


def masked_arguments() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_mask = torch.tensor([[True, True], [False, False], [True, False]])
    y_mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    return (
        sets(3, 2, 5),
        sets(4, 3, 5, seed=1),
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
        x_mask,
        y_mask,
    )


def test_gradcheck() -> None:
    x, y, alpha, x_mask, y_mask = masked_arguments()
    assert torch.autograd.gradcheck(
        lambda x, y, alpha: smooth_chamfer(x, y, alpha=alpha, x_mask=x_mask, y_mask=y_mask), (x, y, alpha)
    )


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_not_needed_change_nothing(needed: tuple[bool, ...], dtype: torch.dtype) -> None:
    full = [
        v.detach().to(dtype if v.dim() else v.dtype).requires_grad_()
        for v in (sets(9, 4, 40), sets(30, 3, 40, seed=1), torch.tensor(3.0))
    ]
    some = [v.detach().requires_grad_(need) for v, need in zip(full, needed, strict=True)]
    for x, y, alpha in (full, some):
        smooth_chamfer(x, y, alpha=alpha).float().square().sum().backward()
    for a, b, need in zip(full, some, needed, strict=True):
        assert b.grad is None if not need else torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_opcheck() -> None:
    x, y, alpha, x_mask, y_mask = masked_arguments()
    torch.library.opcheck(torch.ops.setemb.smooth_chamfer.default, (x, y, alpha, x_mask, y_mask))
    torch.library.opcheck(torch.ops.setemb.smooth_chamfer.default, (x.detach(), y, alpha.detach()))
    narrow = (x.detach().bfloat16(), y.detach().bfloat16(), alpha.detach(), x_mask, y_mask, True)
    torch.library.opcheck(torch.ops.setemb.smooth_chamfer.default, narrow)
    backward = (sets(3, 4), x, y, alpha, x_mask, y_mask, True, False, True)
    # differentiating the backward op raises (test_second_derivative_raises), so only schema and fake are checked
    torch.library.opcheck(
        torch.ops.setemb.smooth_chamfer_backward.default,
        tuple(v.detach() if isinstance(v, Tensor) else v for v in backward),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile_full_graph_and_dynamic() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("inductor")(graph, example_inputs)

    def loss(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
        return (2 * smooth_chamfer(x, y, alpha=alpha)).relu().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for n, m, k in ((5, 7, 3), (8, 4, 2), (13, 9, 6)):
        results = []
        for function in (loss, compiled):
            x, y = sets(n, k, 16, dtype=torch.float32), sets(m, k + 1, 16, dtype=torch.float32, seed=1)
            alpha = torch.tensor(8.0, requires_grad=True)
            value = function(x, y, alpha)
            value.backward()
            results.append((value.detach(), x.grad, y.grad, alpha.grad))
        torch.testing.assert_close(*results)
    assert graphs == 1, "new sizes compiled new graphs"


def test_compile_with_a_number_for_alpha() -> None:
    compiled = torch.compile(
        lambda x, y, a: smooth_chamfer(x, y, alpha=a), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    x, y = sets(3, 2, 8), sets(4, 2, 8, seed=1)
    for alpha in (16.0, 4.0, 1.5):
        torch.testing.assert_close(compiled(x, y, alpha), smooth_chamfer(x, y, alpha=alpha))


def test_autocast_casts_like_a_matrix_product() -> None:
    x, y = sets(5, 4, 32, dtype=torch.float32), sets(6, 4, 32, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = smooth_chamfer(x, y.bfloat16())
    assert s.dtype == torch.bfloat16
    assert torch.equal(s, smooth_chamfer(x.bfloat16(), y.bfloat16()))
    s.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_autocast_leaves_a_float32_result_unrounded() -> None:
    x, y = sets(5, 4, 32, dtype=torch.float32), sets(6, 4, 32, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = smooth_chamfer(x, y, out_dtype=torch.float32)
    assert torch.equal(s, smooth_chamfer(x.bfloat16(), y.bfloat16(), out_dtype=torch.float32))
    assert not torch.equal(s, s.bfloat16().float())


def test_second_derivative_raises() -> None:
    x, y = sets(3, 2, 5), sets(4, 3, 5, seed=1)
    (gradient,) = torch.autograd.grad(smooth_chamfer(x, y).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()


ERRORS = {
    "x of two dimensions": (ValueError, "x: expected 3 dimensions", {"x": torch.ones(3, 5)}),
    "y no tensor": (TypeError, "y: expected a torch.Tensor, got list", {"y": [1.0]}),
    "y nested": (
        TypeError,
        r"y: expected a padded tensor \[sets, vectors, features\], got a nested one: pad it, .*call set_similarity",
        {"y": torch.nested.nested_tensor([torch.ones(3, 5)], layout=torch.jagged)},
    ),
    "x of integers": (TypeError, "x: expected float32.*got int64", {"x": torch.ones(3, 2, 5, dtype=torch.int64)}),
    "features differ": (ValueError, "y: expected 5 features as in x, got 6", {"y": torch.ones(4, 3, 6)}),
    "dtypes differ": (TypeError, "y: expected float32 as in x, got float64", {"y": torch.ones(4, 3, 5).double()}),
    "devices differ": (
        ValueError,
        "y: expected device cpu as of x, got meta",
        {"y": torch.ones(4, 3, 5, device="meta")},
    ),
    "mask of floats": (TypeError, "x_mask: expected bool", {"x_mask": torch.ones(3, 2)}),
    "mask of a wrong shape": (
        ValueError,
        r"y_mask: expected shape \[4, 3\] as of y, got \[3, 4\]",
        {"y_mask": torch.ones(3, 4).bool()},
    ),
    "mask no tensor": (TypeError, "x_mask: expected a boolean", {"x_mask": True}),
    "mask elsewhere": (ValueError, "x_mask: expected device cpu", {"x_mask": torch.ones(3, 2, device="meta").bool()}),
    "alpha 0": (ValueError, "alpha: expected a finite number > 0, got 0", {"alpha": 0}),
    "alpha negative": (ValueError, "alpha: expected a finite number > 0, got -1", {"alpha": -1.0}),
    "alpha NaN": (ValueError, "alpha: expected a finite number > 0, got nan", {"alpha": float("nan")}),
    "alpha infinite": (ValueError, "alpha: expected a finite number > 0, got inf", {"alpha": float("inf")}),
    "alpha a bad tensor": (
        ValueError,
        "alpha: expected a finite number > 0, got nan",
        {"alpha": torch.tensor(float("nan"))},
    ),
    "alpha a string": (TypeError, "alpha: expected a number", {"alpha": "16"}),
    "alpha a vector": (ValueError, "alpha: expected a number or a tensor of 0 dimensions", {"alpha": torch.ones(1)}),
    "out_dtype no dtype": (TypeError, "out_dtype: expected a torch.dtype or None, got str", {"out_dtype": "float32"}),
    "out_dtype narrower": (
        TypeError,
        "out_dtype: expected float32 as of x, got bfloat16",
        {"out_dtype": torch.bfloat16},
    ),
    "alpha of integers": (TypeError, "alpha: expected a floating dtype", {"alpha": torch.tensor(16)}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_got_and_expected(name: str) -> None:
    error, message, change = ERRORS[name]
    arguments: dict[str, Any] = {"x": torch.ones(3, 2, 5), "y": torch.ones(4, 3, 5)} | change
    with pytest.raises(error, match=message):
        smooth_chamfer(arguments.pop("x"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize("group", ["base", "k1", "t64", "collapsed", "batch"])
def test_published_numbers(group: str) -> None:
    """Similarity and gradients as the published code computes them, in float64."""
    data = {
        key.split("/")[1]: torch.from_numpy(PUBLISHED[key]) for key in PUBLISHED.files if key.startswith(group + "/")
    }
    K, L = data["vectors"].tolist()
    x = data["img"].unflatten(0, (-1, K)).requires_grad_()
    y = data["txt"].unflatten(0, (-1, L)).requires_grad_()
    s = smooth_chamfer(x, y, alpha=data["alpha"].item())
    (s * data["W"]).sum().backward()
    for got, expected in (
        (s, data["sim"]),
        (x.grad.flatten(0, 1), data["grad_img"]),
        (y.grad.flatten(0, 1), data["grad_txt"]),
    ):  # type: ignore[union-attr]
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_vector_a_set_is_the_dot_product(dtype: torch.dtype) -> None:
    x, y = (torch.nn.functional.normalize(sets(n, 1, 1, seed=n), dim=-1).to(dtype) for n in (7, 20))
    assert torch.equal(smooth_chamfer(x, y), (x[:, 0] @ y[:, 0].T))


def test_large_alpha_is_chamfer() -> None:
    x, y = sets(5, 4, 16), sets(6, 3, 16, seed=1)
    c = torch.einsum("nkd,mld->nmkl", x, y)
    chamfer = (c.amax(3).mean(2) + c.amax(2).mean(2)) / 2
    torch.testing.assert_close(smooth_chamfer(x, y, alpha=1e9), chamfer)


def test_a_set_without_vectors_has_similarity_0_and_no_gradient() -> None:
    x, y = sets(3, 2, 5, dtype=torch.float32), sets(4, 3, 5, dtype=torch.float32, seed=1)
    x_mask = torch.tensor([[True, True], [False, False], [True, False]])
    s = smooth_chamfer(x, y, x_mask=x_mask)
    s.backward(torch.ones_like(s))
    assert torch.equal(s[1], torch.zeros(4))
    assert torch.equal(x.grad[~x_mask], torch.zeros(3, 5))  # type: ignore[index]
    assert torch.equal(s[0], smooth_chamfer(x[:1], y)[0])
    assert torch.equal(s[2], smooth_chamfer(x[2:, :1], y)[0])


@pytest.mark.parametrize("unit", [False, True], ids=["any norm", "unit vectors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_only_its_own_pairs(value: float, unit: bool) -> None:
    x, y = sets(5, 3, 16, dtype=torch.float32).detach(), sets(40, 3, 16, dtype=torch.float32, seed=1).detach()
    if unit:  # these take another path
        x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
    clean = smooth_chamfer(x, y)
    x[2, 1, 4] = value
    y[17, 0, 0] = value
    s = smooth_chamfer(x, y)
    touched = torch.zeros(5, 40, dtype=torch.bool)
    touched[2], touched[:, 17] = True, True
    assert torch.equal(s.isnan() | s.isinf() | (s.abs() > 1e30), touched)
    torch.testing.assert_close(s[~touched], clean[~touched])


def test_result_does_not_depend_on_threads() -> None:
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        x, y = sets(150, 4, 70, dtype=torch.float32), sets(300, 4, 70, dtype=torch.float32, seed=1)
        s = smooth_chamfer(x, y)
        s.square().sum().backward()
        results.append((s.detach(), x.grad, y.grad))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))  # type: ignore[arg-type]


MEMORY = """
import torch, sys
from setemb_kernels import smooth_chamfer
from benchmarks.memory import peak_beyond_inputs_and_results
x, y = (torch.randn(2048, 8, 16, dtype=getattr(torch, sys.argv[1])).requires_grad_() for _ in range(2))
def step():
    s = smooth_chamfer(x, y)
    return s, *torch.autograd.grad(s, (x, y), torch.ones_like(s))
step_small = smooth_chamfer(x[:64], y[:64]).sum().backward()
print(peak_beyond_inputs_and_results(step))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_never_stored(dtype: str) -> None:
    """All scores would be 1 GiB here, in float32."""
    run = subprocess.run([sys.executable, "-c", MEMORY, dtype], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 64
