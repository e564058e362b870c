"""Calls that pass by the dispatcher: they give what it gives, and whatever has to see the op still sees it.

Here they are made on the CPU, where no kernel of ours is called by its function: the reference serves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from setemb_kernels import (
    _check,
    _direct,
    set_infonce_loss,
    set_sigmoid_loss,
    set_similarity,
    set_triplet_loss,
    slot_attention,
    smooth_chamfer,
)
from setemb_kernels._library import define, forbid_double_backward, implement, register_autograd
from setemb_kernels.ops.smooth_chamfer import mixed, op


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y, ALPHA, BIAS = numbers(5, 2, 6), numbers(5, 3, 6, seed=1), torch.tensor(3.0), torch.tensor(0.5)
X_MASK, Y_MASK = numbers(5, 2) > -1, numbers(5, 3, seed=1) > -1
Q, K, V, SLOT_BIAS = numbers(2, 2, 3, 4), numbers(2, 2, 7, 4, seed=1), numbers(2, 2, 7, 5, seed=2), numbers(2, 2, 3)
TOKENS = numbers(2, 7, seed=3) > -1
MASKS: dict[str, Any] = {"x_mask": X_MASK, "y_mask": Y_MASK}

CASES: dict[str, tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "smooth_chamfer": ("smooth_chamfer", lambda x, y, a: smooth_chamfer(x, y, alpha=a), (X, Y, ALPHA)),
    "smooth_chamfer, masks": ("smooth_chamfer", lambda x, y: smooth_chamfer(x, y, **MASKS), (X, Y)),
    "slot_attention": ("slot_attention", lambda q, k: slot_attention(q, k, None, eps=0, scale=1), (Q, K)),
    "slot_attention, all arguments": (
        "slot_attention",
        lambda q, k, v, b: slot_attention(q, k, v, bias=b, mask=TOKENS),
        (Q, K, V, SLOT_BIAS),
    ),
    "maxsim": ("set_similarity", lambda x, y: set_similarity(x, y, "maxsim", **MASKS), (X, Y)),
    "mean": ("set_similarity", lambda x, y: set_similarity(x, y, "mean"), (X, Y)),
    "match_probability": (
        "set_similarity",
        lambda x, y, a, b: set_similarity(x, y, "match_probability", scale=a, bias=b, pairs="paired"),
        (X, Y, ALPHA, BIAS),
    ),
    "triplet": ("set_triplet_loss", lambda x, y, a: set_triplet_loss(x, y, alpha=a), (X, Y, ALPHA)),
    "infonce": ("set_infonce_loss", lambda x, y, a: set_infonce_loss(x, y, temperature=a), (X, Y, ALPHA)),
    "sigmoid": (
        "set_sigmoid_loss",
        lambda x, y, a, b: set_sigmoid_loss(x, y, scale=a, bias=b, kind="maxsim"),
        (X, Y, ALPHA, BIAS),
    ),
}


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that are called directly, as if all tensors were on a GPU."""
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any], *args: Any) -> Any:
        calls.append(name)
        return function(*args)

    monkeypatch.setattr(_direct, "_on_gpu", lambda x: True)
    for functions in (_direct._IMPLEMENTATIONS, _direct._RECORDED):
        for name, function in functions.items():
            if function is not getattr(torch.ops.setemb, name):
                monkeypatch.setitem(functions, name, partial(counted, name, function))
    return calls


@contextmanager
def dispatched() -> Iterator[None]:
    """A block in which nothing is called directly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_direct, "_on_gpu", lambda x: False)
        yield


def leaves(tensors: tuple[Tensor, ...], needed: int | None = None) -> list[Tensor]:
    """Copies that require gradients: all, or that of one place."""
    return [t.clone().requires_grad_(needed in (None, i)) for i, t in enumerate(tensors)]


def passed(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor | None]:
    """The result, and gradients from one that is not contiguous."""
    result = function(*tensors)
    upstream = torch.arange(1.0, 1 + result.shape[-1]) if result.dim() else torch.tensor(2.0)
    result.backward(upstream.to(result.dtype).expand(result.shape))
    return [result.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_dispatcher(case: str, direct: list[str]) -> None:
    name, function, tensors = CASES[case]
    for needed in (None, *range(len(tensors))):
        with dispatched():
            expected = passed(function, leaves(tensors, needed))
        assert not direct
        got = passed(function, leaves(tensors, needed))
        assert direct[0] == name and f"{name}_backward" in direct
        direct.clear()
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_recorded_where_nothing_requires_a_gradient(case: str, direct: list[str]) -> None:
    name, function, tensors = CASES[case]
    result = function(*tensors)
    assert direct[0] == name and not result.requires_grad
    with torch.no_grad():
        assert not function(*leaves(tensors)).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(function(*tensors), result)


@pytest.mark.parametrize("case", CASES)
def test_a_second_derivative_raises(case: str, direct: list[str]) -> None:
    name, function, tensors = CASES[case]
    x, *others = leaves(tensors)
    (gradient,) = torch.autograd.grad(function(x, *others).square().sum(), x, create_graph=True)
    assert name in direct and f"{name}_backward" not in direct
    with pytest.raises(RuntimeError, match=r"second derivative|not implemented"):  # a mean is made of torch's, too
        gradient.sum().backward()


def test_codes_and_mixed_sets(direct: list[str]) -> None:
    codes = (20 * Y).round().to(torch.int8)
    with dispatched():
        expected = set_similarity(codes, codes, "maxsim")
    torch.testing.assert_close(set_similarity(codes, codes, "maxsim"), expected)
    assert "set_similarity_codes" in direct
    x, y = X.float(), Y.bfloat16()
    torch.testing.assert_close(mixed.similarity(x, y, ALPHA, None, None, None), smooth_chamfer(x, y.float(), alpha=3))
    assert "smooth_chamfer_mixed" in direct


# --- the same implementation both ways: smooth_chamfer's, under a name for which no compiled kernel is registered


def _twin() -> None:
    define("setemb::twin", "(Tensor x, Tensor y, Tensor alpha, Tensor? x_mask, Tensor? y_mask, bool wide) -> Tensor")
    define(
        "setemb::twin_backward",
        "(Tensor grad, Tensor x, Tensor y, Tensor alpha, Tensor? x_mask, Tensor? y_mask, bool need_x, bool need_y,"
        " bool need_alpha) -> (Tensor, Tensor, Tensor)",
    )
    implement("setemb::twin")(op._forward)
    implement("setemb::twin_backward")(op._backward)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        found = _direct.ops.twin_backward(grad, *ctx.saved_tensors, *needs)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None

    register_autograd("setemb::twin", backward, setup_context=op._setup_context)
    forbid_double_backward("setemb::twin_backward")


_twin()


def test_one_implementation_gives_the_same_bits(direct: list[str]) -> None:
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    def twin(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result: Tensor = _direct.ops.twin(x, y, alpha, X_MASK, None, False)
        return result

    with dispatched():
        expected = passed(twin, leaves((X, Y, ALPHA)))
    assert not direct
    got = passed(twin, leaves((X, Y, ALPHA)))
    assert direct == ["twin", "twin_backward"]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))  # type: ignore[arg-type]
    assert saved == 2 * [X.numel(), Y.numel(), 1, X_MASK.numel()]


# --- what has to see the op


class Subclass(Tensor):
    pass


class SeenByDispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenByFunction(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast_of_a_gpu() -> Iterator[None]:
    """`torch.autocast` turns itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("mode", [forward_ad.dual_level, SeenByDispatch, SeenByFunction])
def test_modes_see_the_op(mode: Callable[[], AbstractContextManager[Any]], direct: list[str]) -> None:
    expected = smooth_chamfer(X, Y)
    direct.clear()
    x, y = leaves((X, Y))
    with mode() as entered:
        result = smooth_chamfer(x, y)
    assert not direct
    torch.testing.assert_close(result.detach(), expected)
    if isinstance(entered, (SeenByDispatch, SeenByFunction)):
        assert any("smooth_chamfer" in name for name in entered.seen)
    if mode is not SeenByFunction:  # which sees the call of backward and is off in it
        with mode():
            result.sum().backward()
        assert not direct and x.grad is not None


def test_many_gradients_at_once(direct: list[str]) -> None:
    """Of a batch of upstream gradients that says it is one."""
    x, y = leaves((X, Y))
    s = smooth_chamfer(x, y)
    upstream = torch.eye(s.numel()).double().reshape(-1, *s.shape)[:3]
    (batched,) = torch.autograd.grad(s, x, upstream, retain_graph=True, is_grads_batched=True)
    for one, grad in zip(batched, upstream, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(s, x, grad, retain_graph=True)[0])


def test_nothing_is_recorded_in_inference_mode(direct: list[str]) -> None:
    x, y = leaves((X, Y))
    with torch.inference_mode(), torch.enable_grad():
        assert not smooth_chamfer(x, y).requires_grad
    assert direct


def test_autocast(direct: list[str]) -> None:
    """As the dispatcher does it: x and y are cast, and the rest runs without autocast; gradients are of what came."""
    x, y = leaves((X.float(), Y.float()))
    with autocast_of_a_gpu():
        result = smooth_chamfer(x, y)
        one = set_infonce_loss(x, y)
    assert direct and result.dtype == torch.float16
    torch.testing.assert_close(result, smooth_chamfer(X.half(), Y.half()))
    torch.testing.assert_close(one, set_infonce_loss(X.half(), Y.half()))
    direct.clear()
    with autocast_of_a_gpu():
        result.sum().backward()
    assert direct and x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("inside", [True, False])
def test_fake_tensors(inside: bool, direct: list[str]) -> None:
    mode = FakeTensorMode()
    x, y, alpha = (mode.from_tensor(t) for t in (X, Y, ALPHA))
    with mode if inside else nullcontext():
        result = smooth_chamfer(x, y, alpha=alpha)
    assert not direct and result.shape == (5, 5) and type(result) is type(x)


@pytest.mark.parametrize(
    "unlike",
    [
        lambda x: x.as_subclass(Subclass),
        lambda x: torch._neg_view(-x),
        lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    ],
    ids=["subclass", "negative view", "zero tensor"],
)
@pytest.mark.parametrize("side", [0, 1])
def test_tensors_unlike_others(unlike: Callable[[Tensor], Tensor], side: int, direct: list[str]) -> None:
    sides = [X, Y]
    sides[side] = unlike(sides[side])
    result = smooth_chamfer(*sides)
    assert not direct
    torch.testing.assert_close(result.as_subclass(Tensor), smooth_chamfer(*(s.as_subclass(Tensor) + 0 for s in sides)))


def test_parameters_are_like_others(direct: list[str]) -> None:
    smooth_chamfer(torch.nn.Parameter(X), Y).sum().backward()
    assert direct == ["smooth_chamfer", "smooth_chamfer_backward"]


def test_an_integer_for_a_float_is_made_one(direct: list[str]) -> None:
    _direct.ops.slot_attention(Q, K, None, None, None, 1, 0.0, 0.0)
    assert not direct
    _direct.ops.slot_attention(Q, K, None, None, None, 1.0, 0.0, 0.0)
    assert direct == ["slot_attention"]


def test_on_the_cpu_the_dispatcher_finds_the_compiled_kernel() -> None:
    assert _direct._needs_dispatcher((X, Y))


def test_vmap(direct: list[str]) -> None:
    expected = smooth_chamfer(X, Y)
    direct.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no batching rule
        got = torch.func.vmap(lambda x: smooth_chamfer(x, Y))(X[None])
    assert not direct
    torch.testing.assert_close(got[0], expected)


@pytest.mark.parametrize("case", CASES)
def test_torch_func_gives_the_gradient_of_backward(case: str, direct: list[str]) -> None:
    name, function, tensors = CASES[case]
    places = tuple(range(len(tensors)))

    def loss(*tensors: Tensor) -> Tensor:
        return function(*tensors).square().sum()

    expected = torch.autograd.grad(loss(*(given := leaves(tensors))), given)
    direct.clear()
    torch.testing.assert_close(torch.func.grad(loss, places)(*tensors), expected)
    value, pull = torch.func.vjp(loss, *tensors)
    torch.testing.assert_close(pull(torch.ones_like(value)), expected)
    with pytest.raises(RuntimeError, match=r"second derivative|not implemented"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, *tensors[1:]).sum())(tensors[0])
    assert name not in direct and f"{name}_backward" not in direct


@pytest.mark.parametrize("case", ["smooth_chamfer, masks", "slot_attention, all arguments", "maxsim", "infonce"])
def test_torch_func_transforms_compose(case: str) -> None:
    _, function, (x, *others) = CASES[case]

    def of_x(x: Tensor) -> Tensor:
        return function(x, *others)

    both = torch.stack((x, x.roll(1, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no batching rule
        one_by_one = torch.stack([torch.func.grad(lambda x: of_x(x).sum())(x) for x in both])
        each = torch.func.vmap(torch.func.grad(lambda x: of_x(x).sum()))(both)
        together = torch.func.grad(lambda both: torch.func.vmap(of_x)(both).sum())(both)
        jacobian = torch.func.jacrev(of_x)(x)
    torch.testing.assert_close(each, one_by_one)
    torch.testing.assert_close(together, one_by_one)
    torch.testing.assert_close(jacobian.reshape(-1, *x.shape).sum(0), one_by_one[0])


def test_torch_func_under_autocast() -> None:
    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return smooth_chamfer(x, Y.float()).float().sum()

    (x,) = leaves((X.float(),))
    assert torch.equal(torch.func.grad(loss)(X.float()), torch.autograd.grad(loss(x), x)[0])


FORWARD_MODE = r"has no forward-mode derivative \(jvp\)|Trying to use forward AD with segment_reduce"
"""The second are torch's words, of mean vectors."""


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("case", CASES)
def test_forward_mode_raises(case: str, place: str, direct: list[str]) -> None:
    """Instead of a tangent of zeros."""
    _, function, tensors = CASES[case]
    i = 0 if place == "first" else len(tensors) - 1

    def of_one(v: Tensor) -> Tensor:
        return function(*tensors[:i], v, *tensors[i + 1 :])

    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.jvp(of_one, (tensors[i],), (torch.ones_like(tensors[i]),))
    for requires_grad in (False, True):
        leaf = tensors[i].clone().requires_grad_(requires_grad)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
            of_one(forward_ad.make_dual(leaf, torch.ones_like(leaf)))
    assert not direct


@pytest.mark.parametrize("masked", [False, True])
def test_forward_mode_raises_beside_compilers_and_masks(masked: bool) -> None:
    """Where rows are gathered before the op."""
    torch._dynamo.reset()
    options = MASKS if masked else {}
    for function in (set_similarity, torch.compile(set_similarity, backend="eager")):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
            function(forward_ad.make_dual(X, X), Y, "chamfer", **options)


def test_codes_have_no_forward_mode() -> None:
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.jvp(lambda x: set_similarity(x, (20 * Y).to(torch.int8), "maxsim"), (X.float(),), (X.float(),))


@pytest.mark.parametrize("case", CASES)
def test_compilers_see_the_op(case: str, direct: list[str]) -> None:
    name, function, tensors = CASES[case]
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=backend)(*leaves(tensors)).sum().backward()
    assert f"setemb.{name}" in seen
    assert f"{name}_backward" in direct  # what the graph calls is no longer compiled
    assert name not in direct


def test_compiled_with_its_backward(direct: list[str]) -> None:
    torch._dynamo.reset()
    _, function, tensors = CASES["smooth_chamfer"]
    with dispatched():
        expected = passed(function, leaves(tensors))
    got = passed(torch.compile(function, fullgraph=True, backend="aot_eager"), leaves(tensors))
    assert not direct
    torch.testing.assert_close(got, expected)


def test_tracers_see_the_op(direct: list[str]) -> None:
    graph = make_fx(lambda x, y: smooth_chamfer(x, y))(X, Y)
    assert "setemb.smooth_chamfer" in graph.code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and checks become constants
        traced = torch.jit.trace(lambda x, y: smooth_chamfer(x, y, alpha=ALPHA), (X, Y), check_trace=False)
    assert "setemb::smooth_chamfer" in str(traced.graph)
    assert not direct


# --- numbers that are kept


def test_a_number_is_kept_unless_another_tensor_may_be_made_of_it() -> None:
    _check._number.cache_clear()
    with torch.inference_mode():
        kept = _check.number(2)
    assert _check.number(2.0) is kept and kept.item() == 2 and kept.dtype == torch.float64
    assert not kept.is_inference()
    with FakeTensorMode() as mode:
        assert isinstance(_check.number(2.0), type(mode.from_tensor(X)))
        _check.number(3.0)
    with torch.device("meta"):
        assert _check.number(3.0).device.type == "meta"
    assert _check.number(3.0).item() == 3 and _check.number(2.0) is kept
