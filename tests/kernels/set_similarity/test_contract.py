"""What set_similarity promises beside its numbers: forms of sets, tracing, autocast, errors, bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import setemb_kernels
from setemb_kernels import set_similarity, smooth_chamfer
from setemb_kernels.ops.set_similarity import reference
from tests.kernels.set_similarity.cases import KINDS, Case

ALL_KINDS = (*KINDS, "mean")


def sets(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    v = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return v.to(dtype).requires_grad_()


def masks() -> tuple[Tensor, Tensor]:
    x_mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    y_mask = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    y_mask[:, 1], y_mask[2] = True, False
    return x_mask, y_mask


def rows_and_offsets(v: Tensor, mask: Tensor, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
    return v.flatten(0, 1)[mask.flatten()], torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).to(dtype)


@pytest.mark.parametrize("pairs", ["all", "candidates"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_gradcheck(kind: str, pairs: str) -> None:
    x, y, (x_mask, y_mask) = sets(3, 3, 5), sets(5, 4, 5, seed=1), masks()
    options: dict[str, Any] = {"x_mask": x_mask, "y_mask": y_mask}
    if pairs == "candidates":
        options["candidates"] = torch.tensor([[0, 1, 1], [2, 4, 0], [3, 2, 0]])
    numbers = {"alpha": 2.0, "scale": 1.5, "bias": -0.3}
    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in numbers.values()]

    def function(x: Tensor, y: Tensor, alpha: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # a term of each, as a kind takes some of the numbers alone
        s = set_similarity(x, y, kind, alpha=alpha, scale=scale, bias=bias, **options)  # type: ignore[arg-type]
        return s + alpha + scale + bias

    assert torch.autograd.gradcheck(function, (x, y, *leaves))


def test_vmap_over_a_mask() -> None:
    x, y = sets(3, 3, 5).detach(), sets(5, 4, 5, seed=1).detach()
    masks = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    got = torch.func.vmap(lambda mask: set_similarity(x, y, "maxsim", y_mask=mask))(masks)
    for s, mask in zip(got, masks, strict=True):
        torch.testing.assert_close(s, set_similarity(x, y, "maxsim", y_mask=mask))


LARGE = """
import torch
from setemb_kernels import maxsim, set_similarity
x, y = torch.randn(1, 676, 4096), torch.randn(2, 180, 4096)
truth = (x[0].double() @ y.flatten(0, 1).double().T).view(676, 2, 180).amax(2).sum(0).float()
torch.testing.assert_close(maxsim(x, y)[0], truth)
codes = (y * 20).clamp(-127, 127).round().to(torch.int8)
truth = (x[0].double() @ codes.flatten(0, 1).double().T).view(676, 2, 180).amax(2).sum(0).float()
torch.testing.assert_close(maxsim(x, codes)[0], truth)
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_a_large_set_of_many_features_on_every_processor(capability: str) -> None:
    """Where dot products make tiles whose rows are no multiple of theirs; in a process of its own, as it chooses once
    which module serves."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "MALLOC_CHECK_": "3"}
    run = subprocess.run([sys.executable, "-c", LARGE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_padded_masked_packed_and_nested_sets_are_one(kind: Any) -> None:
    (x_mask, y_mask), options = masks(), {"alpha": 3.0, "scale": 2.0, "bias": 0.5}
    truth = None
    for form in ("masked", "packed", "nested", "mixed"):
        x, y = sets(3, 3, 5), sets(5, 4, 5, seed=1)
        with torch.no_grad():
            x[~x_mask], y[~y_mask] = torch.nan, torch.inf
        given: dict[str, Any] = {"x_mask": x_mask, "y_mask": y_mask}
        a, b = x, y
        if form != "masked":
            a, x_offsets = rows_and_offsets(x, x_mask)
            given = {"x_offsets": x_offsets, "y_mask": y_mask}
        if form in ("packed", "nested"):
            b, y_offsets = rows_and_offsets(y, y_mask, torch.int64)
            given = {"x_offsets": x_offsets, "y_offsets": y_offsets}
        if form == "nested":
            a, b = (torch.nested.nested_tensor_from_jagged(v, o.long()) for v, o in ((a, x_offsets), (b, y_offsets)))
            given = {}
        s = set_similarity(a, b, kind, **options, **given)
        s.backward(torch.arange(15.0, dtype=torch.float64).view(3, 5) - 5)
        results = (s.detach(), x.grad, y.grad)
        if truth is None:
            truth = results
            assert (s[1] == 0).all() and (s[:, 2] == 0).all() and (s[[0, 2]][:, [0, 1, 3, 4]] != 0).all()
            assert (x.grad[~x_mask] == 0).all() and (y.grad[~y_mask] == 0).all()  # type: ignore[index]
        torch.testing.assert_close(results, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_paired_and_candidates_are_parts_of_all_pairs(kind: Any) -> None:
    x, y = sets(4, 3, 7, dtype=torch.float32), sets(4, 6, 7, dtype=torch.float32, seed=1)
    everything = set_similarity(x, y, kind)
    paired = set_similarity(x, y, kind, pairs="paired")
    assert paired.shape == (4,)
    torch.testing.assert_close(paired, everything.diagonal())
    chosen = torch.tensor([[3, -1], [0, 0], [-1, -1], [2, 1]])
    some = set_similarity(x, y, kind, candidates=chosen)
    assert (some[chosen < 0] == -torch.inf).all()
    torch.testing.assert_close(some[chosen >= 0], everything.gather(1, chosen.clamp(min=0))[chosen >= 0])
    some[2].sum().backward()  # all of them none
    assert (x.grad == 0).all() and (y.grad == 0).all()


def test_a_set_without_candidates() -> None:
    x, y = sets(4, 3, 7), sets(4, 6, 7, seed=1)
    s = set_similarity(x, y, "maxsim", candidates=torch.empty(4, 0, dtype=torch.int64))
    assert s.shape == (4, 0)
    s.sum().backward()
    assert (x.grad == 0).all()


def test_mean_of_16_bit_sets_is_accumulated_in_float32() -> None:
    x, y = (sets(6, 300, 16, dtype=torch.bfloat16, seed=n).detach() for n in (0, 1))
    truth = torch.einsum("nkd,mld->nm", x.double(), y.double()) / 300**2
    wide = set_similarity(x, y, "mean", out_dtype=torch.float32)
    torch.testing.assert_close(wide.double(), truth, rtol=1e-5, atol=1e-6)
    assert torch.equal(set_similarity(x, y, "mean"), wide.bfloat16())


def test_thin_names() -> None:
    x, y = sets(4, 3, 7), sets(5, 6, 7, seed=1)
    for name in ("maxsim", "soft_maxsim", "chamfer", "match_probability"):
        function = getattr(setemb_kernels, name)
        assert torch.equal(function(x, y, out_dtype=torch.float64), set_similarity(x, y, name))  # type: ignore[arg-type]
    torch.testing.assert_close(
        setemb_kernels.maxsim(x, y, reduction="mean"), torch.einsum("nkd,mld->nmkl", x, y).amax(3).mean(2)
    )
    assert torch.equal(set_similarity(x, y), smooth_chamfer(x, y))


@pytest.mark.parametrize("kind", ["chamfer", "maxsim", "max"])
def test_equals_give_the_gradient_to_the_first(kind: Any) -> None:
    x = torch.ones(1, 40, 2, dtype=torch.float32, requires_grad=True)
    y = torch.ones(1, 70, 2, dtype=torch.float32, requires_grad=True)
    set_similarity(x, y, kind).sum().backward()
    own = torch.zeros(2, 70)  # how often each vector of x and of y was some maximum
    if kind == "max":
        own[0, 0] = own[1, 0] = 1
    else:
        share = 1 / 2 if kind == "chamfer" else 1
        own[0, :40], own[1, 0] = share / 40 if kind == "chamfer" else 1, share if kind == "chamfer" else 40
        if kind == "chamfer":
            own[0, 0] += share
            own[1] += share / 70
    torch.testing.assert_close(x.grad[0, :, 0], own[0, :40])  # type: ignore[index]
    torch.testing.assert_close(y.grad[0, :, 0], own[1])  # type: ignore[index]


@pytest.mark.parametrize("L", [3, 150, 700])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_what_is_not_finite_reaches_only_its_own_pairs(kind: Any, L: int) -> None:
    x, y = (sets(n, k, 16, dtype=torch.float32, seed=n).detach() / 4 for n, k in ((5, 3), (9, L)))
    options = {"alpha": 16.0, "pairs": "all", "y_offsets": None}
    clean = set_similarity(x, y, kind, **options)  # type: ignore[arg-type]
    x[2, 1, 4] = y[7, L // 2, 0] = torch.nan
    for place in range(L):  # wherever it is
        if place in (0, L - 1, L // 2):
            y[7] = y[7].nan_to_num()
            y[7, place, 0] = torch.nan
            s = set_similarity(x, y, kind, **options)  # type: ignore[arg-type]
            touched = torch.zeros(5, 9, dtype=torch.bool)
            touched[2], touched[:, 7] = True, True
            assert torch.equal(s.isnan(), touched)
            torch.testing.assert_close(s[~touched], clean[~touched])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_not_needed_change_nothing(kind: Any, dtype: torch.dtype) -> None:
    values = [sets(9, 4, 40, dtype=dtype), sets(30, 30, 40, seed=1, dtype=dtype), torch.tensor(3.0), torch.tensor(0.5)]
    full = [v.detach().requires_grad_() for v in values]

    def run(x: Tensor, y: Tensor, number: Tensor, bias: Tensor) -> None:
        s = set_similarity(
            x, y, kind, alpha=number, scale=number, bias=bias, pairs="all", y_mask=torch.ones(30, 30).bool()
        )
        s.float().square().sum().backward()

    run(*full)
    for needed in ((1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0), (1, 0, 1, 1)):
        some = [v.detach().requires_grad_(bool(need)) for v, need in zip(values, needed, strict=True)]
        run(*some)
        for a, b, need in zip(full, some, needed, strict=True):
            assert b.grad is None if not need or a.grad is None else torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    op = torch.ops.setemb
    for pairs, dtype, wide in (("", torch.float64, False), ("candidates", torch.bfloat16, True)):
        i = Case("", 6, 7, (0, 3), (1, 4), 5, pairs=pairs).build(kind, dtype)
        x, y, alpha, bias = (v.requires_grad_() for v in (i.x, i.y, i.alpha, i.bias))
        arguments = (x, i.x_offsets, y, i.y_offsets, i.candidates, alpha, bias, kind, i.mean)
        torch.library.opcheck(op.set_similarity.default, (*arguments, wide))
        # differentiating the backward op raises (test_second_derivative_raises), so only schema and fake are checked
        torch.library.opcheck(
            op.set_similarity_backward.default,
            (i.grad, *(v.detach() if isinstance(v, Tensor) else v for v in arguments), True, False, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    ("kind", "form"), [("maxsim", "padded"), ("chamfer", "masked"), ("match_probability", "packed"), ("mean", "masked")]
)
def test_compile_full_graph_and_dynamic(kind: Any, form: str) -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("inductor")(graph, example_inputs)

    def loss(x: Tensor, y: Tensor, number: Tensor, given: dict[str, Tensor]) -> Tensor:
        return (2 * set_similarity(x, y, kind, scale=number, **given)).relu().sum() * number

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    first = 0
    for n, m, k in ((5, 7, 3), (8, 4, 2), (13, 9, 6)):
        results = []
        for function in (loss, compiled):
            x, y = sets(n, k, 24, dtype=torch.float32), sets(m, k + 1, 24, dtype=torch.float32, seed=1)
            number = torch.tensor(2.0, requires_grad=True)
            given, a, b = {}, x, y
            if form == "masked":
                given = {"y_mask": torch.rand(m, k + 1, generator=torch.Generator().manual_seed(2)) < 0.7}
            if form == "packed":
                a = x = sets(n * k, 24, dtype=torch.float32)
                b = y = sets(m * (k + 1), 24, dtype=torch.float32, seed=1)
                given = {f"{side}_offsets": torch.arange(c + 1) * s for side, c, s in (("x", n, k), ("y", m, k + 1))}
            value = function(a, b, number, given)
            value.backward()
            results.append((value.detach(), x.grad, y.grad, number.grad))
        torch.testing.assert_close(*results)
        first = first or graphs  # torch may begin anew while it learns which numbers are constant
    assert graphs == first, "new sizes compiled new graphs"


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_autocast_casts_like_a_matrix_product(kind: Any) -> None:
    x, y = sets(5, 4, 32, dtype=torch.float32), sets(6, 4, 32, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = set_similarity(x, y.bfloat16(), kind)
        wide = set_similarity(x, y, kind, out_dtype=torch.float32)
    assert s.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert torch.equal(s, set_similarity(x.bfloat16(), y.bfloat16(), kind))
    assert torch.equal(wide, set_similarity(x.bfloat16(), y.bfloat16(), kind, out_dtype=torch.float32))
    s.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_second_derivative_raises(kind: Any) -> None:
    x, y = sets(3, 2, 5), sets(4, 3, 5, seed=1)
    (gradient,) = torch.autograd.grad(set_similarity(x, y, kind).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative|not implemented"):  # torch's words, of the mean vectors
        gradient.sum().backward()


OFFSETS = torch.tensor([0, 2, 6])
ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "unknown kind": (ValueError, "kind: expected one of smooth_chamfer, .*got 'cosine'", {"kind": "cosine"}),
    "unknown reduction": (ValueError, "reduction: expected 'sum' or 'mean', got 'max'", {"reduction": "max"}),
    "reduction of a kind of one form": (
        ValueError,
        "reduction: expected 'sum' for chamfer, .*got 'mean'",
        {"kind": "chamfer", "reduction": "mean"},
    ),
    "unknown pairs": (ValueError, "pairs: expected 'all' or 'paired', got 'some'", {"pairs": "some"}),
    "x of two dimensions": (ValueError, "x: expected 3 dimensions", {"x": torch.ones(3, 5)}),
    "x of three beside offsets": (ValueError, r"x: expected 2 dimensions \[vectors", {"x_offsets": OFFSETS}),
    "y no tensor": (TypeError, "y: expected a torch.Tensor, got list", {"y": [1.0]}),
    "features differ": (ValueError, "y: expected 5 features as in x, got 6", {"y": torch.ones(4, 3, 6)}),
    "dtypes differ": (TypeError, "y: expected float32 as in x, got float64", {"y": torch.ones(4, 3, 5).double()}),
    "devices differ": (ValueError, "y: expected device cpu as of x, got meta", {"y": torch.ones(4, 3, 5).to("meta")}),
    "mask of a wrong shape": (
        ValueError,
        r"y_mask: expected shape \[4, 3\] as of y, got \[3, 4\]",
        {"y_mask": torch.ones(3, 4).bool()},
    ),
    "mask beside offsets": (
        ValueError,
        "x_mask: expected None beside x_offsets",
        {"x": torch.ones(6, 5), "x_offsets": OFFSETS, "x_mask": torch.ones(6).bool()},
    ),
    "offsets no tensor": (
        TypeError,
        "x_offsets: expected a torch.Tensor of int32 or int64 or None, got list",
        {"x": torch.ones(6, 5), "x_offsets": [0, 6]},
    ),
    "offsets of floats": (
        TypeError,
        "x_offsets: expected int32 or int64, got float32",
        {"x": torch.ones(6, 5), "x_offsets": OFFSETS.float()},
    ),
    "offsets of no sets": (
        ValueError,
        r"x_offsets: expected shape \[sets \+ 1\], got \[0\]",
        {"x": torch.ones(6, 5), "x_offsets": OFFSETS[:0]},
    ),
    "offsets beyond the rows": (
        ValueError,
        r"x_offsets: expected offsets from 0 that never decrease, at most 5, got 6 at \[2\], after 2",
        {"x": torch.ones(5, 5), "x_offsets": OFFSETS},
    ),
    "offsets that decrease": (
        ValueError,
        r"x_offsets: expected offsets from 0 that never decrease, at most 6, got 2 at \[2\], after 4",
        {"x": torch.ones(6, 5), "x_offsets": torch.tensor([0, 4, 2, 6])},
    ),
    "offsets not from 0": (
        ValueError,
        r"y_offsets: expected offsets from 0 that never decrease, at most 6, got 1 at \[0\]$",
        {"y": torch.ones(6, 5), "y_offsets": OFFSETS + 1},
    ),
    "offsets from before the rows": (
        ValueError,
        r"y_offsets: expected offsets from 0 that never decrease, at most 6, got -1 at \[0\]$",
        {"y": torch.ones(6, 5), "y_offsets": OFFSETS - 1},
    ),
    "offsets of codes": (
        ValueError,
        r"y_offsets: expected offsets from 0 that never decrease, at most 5, got 6 at \[2\], after 2",
        {"y": torch.ones(5, 5).to(torch.int8), "y_offsets": OFFSETS},
    ),
    "pairs of other numbers": (
        ValueError,
        "y: expected 3 sets as in x for pairs='paired', got 4",
        {"pairs": "paired"},
    ),
    "pairs and candidates": (
        ValueError,
        "candidates: expected None beside pairs='paired'",
        {"pairs": "paired", "candidates": torch.zeros(3, 1).long()},
    ),
    "candidates no tensor": (TypeError, "candidates: expected a torch.Tensor of int64", {"candidates": [[0]]}),
    "candidates of int32": (
        TypeError,
        "candidates: expected int64, got int32",
        {"candidates": torch.zeros(3, 1).int()},
    ),
    "candidates of others": (
        ValueError,
        r"candidates: expected shape \[3, candidates\] as of x, got \[4, 1\]",
        {"candidates": torch.zeros(4, 1).long()},
    ),
    "candidates beyond y": (
        ValueError,
        "candidates: expected -1 .none. or the index of one of 4 sets of y, got 0 to 4",
        {"candidates": torch.tensor([[0], [4], [1]])},
    ),
    "candidates below -1": (ValueError, "candidates: .*got -2 to 0", {"candidates": torch.tensor([[0], [-2], [0]])}),
    "alpha 0": (ValueError, "alpha: expected a finite number > 0, got 0", {"kind": "soft_maxsim", "alpha": 0}),
    "alpha a bad tensor": (
        ValueError,
        "alpha: expected a finite number > 0, got nan",
        {"kind": "soft_maxsim", "alpha": torch.tensor(float("nan"))},
    ),
    "scale a string": (TypeError, "scale: expected a number", {"kind": "match_probability", "scale": "1"}),
    "bias infinite": (
        ValueError,
        "bias: expected a finite number, got inf",
        {"kind": "match_probability", "bias": float("inf")},
    ),
    "scale a vector": (
        ValueError,
        "scale: expected a number or a tensor of 0 dimensions",
        {"kind": "match_probability", "scale": torch.ones(1)},
    ),
    "out_dtype narrower": (
        TypeError,
        "out_dtype: expected float32 as of x, got bfloat16",
        {"out_dtype": torch.bfloat16},
    ),
    "nested beside a mask": (
        ValueError,
        "x_mask: expected None beside a nested tensor",
        {"x": torch.nested.nested_tensor([torch.ones(2, 5)], layout=torch.jagged), "x_mask": torch.ones(1, 2).bool()},
    ),
    "nested of another layout": (
        ValueError,
        "x: expected a nested tensor of layout torch.jagged",
        {"x": torch.nested.nested_tensor([torch.ones(2, 5)])},
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ERRORS for kind in (ALL_KINDS if "kind" not in ERRORS[name][2] else [""])],
)
def test_errors_name_argument_got_and_expected(name: str, kind: str) -> None:
    error, message, change = ERRORS[name]
    arguments: dict[str, Any] = {"x": torch.ones(3, 2, 5), "y": torch.ones(4, 3, 5), "kind": kind} | change
    with pytest.raises(error, match=message):
        set_similarity(**arguments)


@pytest.mark.parametrize("name", [name for name in ERRORS if name.startswith("offsets") and "y" in ERRORS[name][2]])
def test_wrong_offsets_stop_a_compiled_mean(name: str) -> None:
    """There the check cannot be Python's."""
    error, message, change = ERRORS[name]
    compiled = torch.compile(set_similarity, fullgraph=True, dynamic=True, backend="aot_eager")
    with pytest.raises(error, match=message):
        compiled(torch.ones(3, 2, 5), kind="mean", **change)


@pytest.mark.parametrize("offsets", [[0, 2, 9], [0, 4, 2], [-1, 2, 4], [0, 0, 0, 7], [3]])
def test_wrong_offsets_are_told_alike_by_every_implementation(offsets: list[int]) -> None:
    y_offsets, number = torch.tensor(offsets), torch.tensor(1.0)
    arguments = (torch.ones(6, 5), torch.tensor([0, 6]), torch.ones(6, 5), y_offsets, None, number, number)
    told = set()
    for function in (torch.ops.setemb.set_similarity, reference.forward):
        with pytest.raises(ValueError, match="y_offsets") as error:
            function(*arguments, "maxsim", False, False)
        told.add(str(error.value))
    with pytest.raises(ValueError, match="y_offsets") as error:
        set_similarity(torch.ones(1, 6, 5), torch.ones(6, 5), "mean", y_offsets=y_offsets)
    assert told == {str(error.value)}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_candidates_where_there_is_no_set(kind: Any) -> None:
    x, rows = sets(3, 2, 5), sets(4, 5, seed=1)
    s = set_similarity(x, rows, kind, y_offsets=torch.tensor([0]), candidates=torch.full((3, 2), -1))
    assert torch.equal(s, torch.full((3, 2), -torch.inf, dtype=torch.float64))
    s.sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", ["", "candidates"])
def test_result_does_not_depend_on_threads(kind: str, pairs: str) -> None:
    i = Case("", 40, 50, (1, 9), (1, 90), 24, pairs=pairs).build(kind, torch.float32)
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        x, y = i.x.clone().requires_grad_(), i.y.clone().requires_grad_()
        s = torch.ops.setemb.set_similarity(x, i.x_offsets, y, i.y_offsets, i.candidates, *i[5:9], False)
        s.backward(i.grad)
        results.append((s.detach(), x.grad, y.grad))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))  # type: ignore[arg-type]


MEMORY = """
import torch, sys
from setemb_kernels import set_similarity
from benchmarks.memory import peak_beyond_inputs_and_results
x, y = (torch.randn(n, k, 16, dtype=getattr(torch, sys.argv[2])).requires_grad_() for n, k in ((64, 32), (512, 256)))
def step(x=x, y=y):
    s = set_similarity(x, y, sys.argv[1], pairs="all", x_mask=torch.ones(x.shape[:2]).bool(), candidates=None)
    return s, *torch.autograd.grad(s, (x, y), torch.ones_like(s))
step(x[:8], y[:8])
print(peak_beyond_inputs_and_results(step))
"""


@pytest.mark.parametrize(("kind", "dtype"), [("maxsim", "float32"), ("match_probability", "bfloat16")])
def test_scores_are_never_stored(kind: str, dtype: str) -> None:
    """All scores would be 1 GiB here, in float32."""
    run = subprocess.run([sys.executable, "-c", MEMORY, kind, dtype], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 96


@pytest.mark.parametrize("kind", ["maxsim", "chamfer"])
def test_more_candidates_than_a_task_takes(kind: Any) -> None:
    x, y = sets(2, 5, 24, dtype=torch.float32), sets(50, 7, 24, dtype=torch.float32, seed=1)
    chosen = torch.randint(0, 50, (2, 70), generator=torch.Generator().manual_seed(3))
    got, all_pairs = set_similarity(x, y, kind, candidates=chosen), set_similarity(x, y, kind)
    expected = all_pairs.gather(1, chosen)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(2, 70, generator=torch.Generator().manual_seed(4))
    for a, b in zip(
        torch.autograd.grad(got, (x, y), upstream), torch.autograd.grad(expected, (x, y), upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_alpha_out_of_range(dtype: torch.dtype) -> None:
    """It grows with one over alpha squared; out of range it is infinite, as any other."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, 8, generator=generator, dtype=dtype) for _ in range(2))
    alpha = torch.tensor(1e-30, dtype=dtype, requires_grad=True)
    set_similarity(x, y, kind="soft_maxsim", alpha=alpha).sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.isinf() if dtype == torch.float32 else alpha.grad.abs() > 1e50
