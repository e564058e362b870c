"""What slot_attention promises beside its numbers: tracing, autocast, errors, bounded memory, padding."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from setemb_kernels import slot_attention


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def arguments(shared: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, bias of two items, three heads, four slots, seven tokens."""
    G = 1 if shared else 3
    shapes = ((2, 3, 4, 5), (2, G, 7, 5), (2, G, 7, 6), (2, 3, 4))
    q, k, v, bias = (normal(*shape, dtype=dtype, seed=n) for n, shape in enumerate(shapes))
    return q, k, v, bias


MASK = torch.tensor([[True, False, True, True, False, True, True], [False] * 7])


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared: bool) -> None:
    for mask, options in ((None, {}), (MASK, {"eps": 0.5}), (MASK, {"eps": 0.0, "token_eps": 1e-3, "scale": -0.7})):
        assert torch.autograd.gradcheck(
            lambda q, k, v, bias, mask=mask, options=options: slot_attention(q, k, v, bias=bias, mask=mask, **options),
            arguments(shared),
        )


@pytest.mark.parametrize("needed", [(i == 0, i == 1, i == 2, i == 3) for i in range(4)], ids=["q", "k", "v", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_not_needed_change_nothing(needed: tuple[bool, ...], dtype: torch.dtype) -> None:
    full = arguments(dtype=dtype)
    some = [t.detach().requires_grad_(need) for t, need in zip(full, needed, strict=True)]
    for q, k, v, bias in (full, some):
        slot_attention(q, k, v, bias=bias).float().square().sum().backward()
    for a, b, need in zip(full, some, needed, strict=True):
        assert b.grad is None if not need else torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared: bool) -> None:
    q, k, v, bias = arguments(shared)
    heads_first = q.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    op = torch.ops.setemb.slot_attention
    torch.library.opcheck(op.default, (q, k, v, bias, MASK, 0.3, 1e-7, 1e-3))
    torch.library.opcheck(op.default, (heads_first, k.detach(), v, None, None, 0.3, 0.0, 0.0))
    out, total = op(*(t.detach() for t in (q, k, v)), bias.detach(), MASK, 0.3, 1e-7, 1e-3)
    # differentiating the backward op raises (test_second_derivative_raises), so only schema and fake are checked
    for first in (q, heads_first, q.detach()[:1].expand_as(q)):
        tensors = (normal(*out.shape, seed=9).detach(), first.detach(), k.detach(), v.detach(), bias.detach(), MASK)
        torch.library.opcheck(
            torch.ops.setemb.slot_attention_backward.default,
            (*tensors, out, total, 0.3, 1e-3, True, True, False, True),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compile_full_graph_and_dynamic() -> None:
    """New numbers of items and tokens take the graph that is there."""
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("inductor")(graph, example_inputs)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return slot_attention(slot_attention(2 * q, k, v), k, v).relu().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    first = 0
    for B, T in ((5, 7), (8, 4), (13, 9)):
        results = []
        for function in (loss, compiled):
            q, k, v = (normal(B, h, n, 16, dtype=torch.float32, seed=n) for h, n in ((2, 3), (1, T), (1, T)))
            value = function(q, k, v)
            value.backward()
            results.append((value.detach(), q.grad, k.grad, v.grad))
        torch.testing.assert_close(*results)
        first = first or graphs
    assert graphs == first, "new sizes compiled new graphs"


def test_autocast_casts_like_a_matrix_product() -> None:
    q, k, v, bias = arguments(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = slot_attention(q, k, v.bfloat16(), bias=bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, slot_attention(*(t.bfloat16() for t in (q, k, v)), bias=bias.bfloat16()))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("double", ["q", "k", "v", "bias"])
def test_autocast_leaves_float64_alone_and_mixes_nothing_with_it(double: str) -> None:
    """Memory of one type would be read as another."""
    values = dict(zip(("q", "k", "v", "bias"), (t.detach() for t in arguments(dtype=torch.float32)), strict=True))
    values[double] = values[double].double()
    all_double = {name: t.double() for name, t in values.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"expected float.* as in q, got float"):
            slot_attention(**values)
        out = slot_attention(**all_double)
    assert torch.equal(out, slot_attention(**all_double))


def test_second_derivative_raises() -> None:
    q, k, v, _ = arguments()
    (gradient,) = torch.autograd.grad(slot_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()


ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "q of three dimensions": (ValueError, "q: expected 4 dimensions", {"q": torch.ones(3, 4, 5)}),
    "k no tensor": (TypeError, "k: expected a torch.Tensor, got list", {"k": [1.0]}),
    "q nested": (
        TypeError,
        "q: expected a padded tensor .*, got a nested one: pad it, as torch.nested.to_padded_tensor does, .*a mask$",
        {"q": torch.nested.nested_tensor([torch.ones(4, 5)], layout=torch.jagged)},
    ),
    "q of integers": (TypeError, "q: expected float32.*got int64", {"q": torch.ones(2, 3, 4, 5).long()}),
    "features differ": (ValueError, "k: expected 5 features as in q, got 6", {"k": torch.ones(2, 3, 7, 6)}),
    "items differ": (ValueError, "k: expected 2 items as in q, got 1", {"k": torch.ones(1, 3, 7, 5)}),
    "heads differ": (ValueError, "k: expected 1 or 3 heads as in q, got 2", {"k": torch.ones(2, 2, 7, 5)}),
    "heads of k and v differ": (ValueError, "v: expected 3 heads as in k, got 1", {"v": torch.ones(2, 1, 7, 6)}),
    "tokens differ": (ValueError, "v: expected 7 tokens as in k, got 8", {"v": torch.ones(2, 3, 8, 6)}),
    "dtypes differ": (TypeError, "v: expected float32 as in q, got float64", {"v": torch.ones(2, 3, 7, 6).double()}),
    "devices differ": (
        ValueError,
        "k: expected device cpu as of q, got meta",
        {"k": torch.ones(2, 3, 7, 5, device="meta")},
    ),
    "bias of a wrong shape": (ValueError, "bias: expected 4 slots as in q, got 5", {"bias": torch.ones(2, 3, 5)}),
    "bias of a wrong rank": (ValueError, "bias: expected 3 dimensions", {"bias": torch.ones(4)}),
    "mask of floats": (TypeError, "mask: expected bool", {"mask": torch.ones(2, 7)}),
    "mask of a wrong shape": (ValueError, r"mask: expected shape \[2, 7\]", {"mask": torch.ones(2, 3).bool()}),
    "scale NaN": (ValueError, "scale: expected a finite number, got nan", {"scale": float("nan")}),
    "scale a string": (TypeError, "scale: expected a number or None, got str", {"scale": "1"}),
    "eps negative": (ValueError, "eps: expected a finite number >= 0, got -1", {"eps": -1.0}),
    "eps NaN": (ValueError, "eps: expected a finite number >= 0, got nan", {"eps": float("nan")}),
    "token_eps negative": (ValueError, "token_eps: expected a finite number >= 0, got -1", {"token_eps": -1}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_got_and_expected(name: str) -> None:
    error, message, change = ERRORS[name]
    values: dict[str, Any] = {"q": torch.ones(2, 3, 4, 5), "k": torch.ones(2, 3, 7, 5), "v": torch.ones(2, 3, 7, 6)}
    values |= change
    with pytest.raises(error, match=message):
        slot_attention(values.pop("q"), values.pop("k"), values.pop("v"), **values)


@pytest.mark.parametrize("shared", [False, True])
def test_attention_that_is_asked_for(shared: bool) -> None:
    q, k, v, bias = arguments(shared)
    out, attention = slot_attention(q, k, v, bias=bias, mask=MASK, return_attention=True)
    assert attention.shape == (2, 3, 4, 7)
    torch.testing.assert_close(attention.sum(2), MASK[:, None].expand(2, 3, 7).double())
    torch.testing.assert_close(out, attention @ v / (attention.sum(-1, keepdim=True) + 1e-7))
    assert torch.autograd.gradcheck(
        lambda q, k, v: slot_attention(q, k, v, mask=MASK, return_attention=True)[1], (q, k, v.detach())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_no_bit_beyond_rounding(dtype: torch.dtype) -> None:
    """Whatever the padding holds."""
    q, k, v, _ = (t.detach() for t in arguments(dtype=dtype))
    plain, eps = slot_attention(q, k, v), torch.finfo(dtype).eps
    for more in (1, 30, 2000):
        mask = torch.arange(7 + more).expand(2, -1) < 7
        padded = [torch.cat((t, t.new_full((2, 3, more, t.shape[3]), float("nan"))), 2) for t in (k, v)]
        torch.testing.assert_close(slot_attention(q, *padded, mask=mask), plain, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_only_its_own_item(value: float) -> None:
    q, k, v, _ = (t.detach() for t in arguments(dtype=torch.float32))
    clean = slot_attention(q, k, v)
    for tokens in (k, v):
        tokens[1, 2, 3, 0] = value
        out = slot_attention(q, k, v)
        assert not out[1, 2].isfinite().all()
        assert torch.equal(out[0], clean[0])
        assert torch.equal(out[1, :2], clean[1, :2])
        tokens[1, 2, 3, 0] = 0


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, 0x7FC00101), (torch.float64, 0x7FF80000000007A2)], ids=["float32", "float64"]
)
def test_a_nan_of_any_payload_stays_one(dtype: torch.dtype, bits: int) -> None:
    for slot in range(4):
        q, k, v, _ = (t.detach() for t in arguments(dtype=dtype))
        q.view(torch.int32 if dtype == torch.float32 else torch.int64)[0, 0, slot, 0] = bits
        assert q.isnan().sum() == 1
        out = slot_attention(q, k, v)
        assert out[0, 0].isnan().all()
        assert out[0, 1:].isfinite().all()


def test_expanded_keys_count_as_one_head() -> None:
    q, k, v, _ = arguments(shared=True)
    one = slot_attention(q, k, v)
    expanded = slot_attention(q, k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1))
    assert torch.equal(one, expanded)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (one, expanded)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("expanded", ["k", "v"])
def test_keys_alone_or_values_alone_may_be_expanded(expanded: str) -> None:
    q, k, v, _ = arguments()
    values = {"k": k, "v": v}
    values[expanded] = values[expanded][:, :1].expand(-1, 3, -1, -1)
    copied = {name: t.clone(memory_format=torch.contiguous_format) for name, t in values.items()}
    results = []
    for tokens in (values, copied):
        out = slot_attention(q, **tokens)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.testing.assert_close(*results)


def test_result_does_not_depend_on_threads() -> None:
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        q, k, v = (normal(2, h, t, 70, dtype=torch.float32, seed=t) for h, t in ((4, 5), (1, 3000), (1, 3000)))
        out = slot_attention(q, k, v)
        out.square().sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))  # type: ignore[arg-type]


MEMORY = """
import torch, sys
from setemb_kernels import slot_attention
from benchmarks.memory import peak_beyond_inputs_and_results
dtype = getattr(torch, sys.argv[1])
q, k, v = (torch.randn(8, h, n, 32, dtype=dtype).requires_grad_() for h, n in ((8, 64), (1, 16384), (1, 16384)))
def step(q=q, k=k, v=v):
    out = slot_attention(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
step(*(t[:1, :1, :64] for t in (q, k, v)))
print(peak_beyond_inputs_and_results(step))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_is_never_stored(dtype: str) -> None:
    """It would be 256 MiB here, in float32."""
    run = subprocess.run([sys.executable, "-c", MEMORY, dtype], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 32
