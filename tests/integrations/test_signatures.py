"""Modules with the call signatures of other packages: against those packages' plain functions, or the formula."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from setemb_kernels.integrations import flash_maxsim as flash
from setemb_kernels.integrations import late_interaction_kernels as lik
from setemb_kernels.integrations import late_interaction_kernels_fp8 as fp8
from tests.integrations.same import EXACT, flags, sets, with_gradients


def plain(q: Tensor, d: Tensor, q_mask: Tensor | None = None, d_mask: Tensor | None = None) -> Tensor:
    """MaxSim of all pairs ``[N, K, D]``, ``[M, L, D]``; of a set of nothing 0."""
    scores = torch.einsum("nkd,mld->nmkl", q, d)
    if d_mask is not None:
        scores = scores.masked_fill(~d_mask[None, :, None], -1e9)
    best = scores.max(-1).values
    if d_mask is not None:
        best = best * d_mask.any(1)[None, :, None]
    return (best if q_mask is None else best * q_mask[:, None]).sum(-1)


Q, D = sets(5, 6, seed=1), sets(7, 9, seed=2)
OWN = sets(15, 9, seed=3).view(5, 3, 9, 16)


def nothing_in_one(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[1] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_maxsim(normalize: bool, masked: bool) -> None:
    q, d = (Q * 2, D * 3) if normalize else (Q, D)
    masks = (nothing_in_one(flags(5, 6)), nothing_in_one(flags(7, 9))) if masked else (None, None)

    def theirs(q: Tensor, d: Tensor) -> Tensor:
        if normalize:
            q, d = (torch.nn.functional.normalize(v, dim=-1) for v in (q, d))
        return plain(q, d, *masks)

    options = {"q_mask": masks[0], "d_mask": masks[1], "normalize": normalize, "backward": "lowmem"}
    torch.testing.assert_close(with_gradients(lik.maxsim, q, d, **options), with_gradients(theirs, q, d), **EXACT)


def test_maxsim_of_fewer_axes() -> None:
    whole = plain(Q, D)
    torch.testing.assert_close(lik.maxsim(Q[0], D), whole[0], **EXACT)
    torch.testing.assert_close(lik.maxsim(Q, D[0]), whole[:, 0], **EXACT)
    torch.testing.assert_close(lik.maxsim(Q[0], D[0]), whole[0, 0], **EXACT)
    mask = flags(7, 9)
    masked = lik.maxsim(Q[0], D[1], d_mask=mask[1])
    torch.testing.assert_close(masked, plain(Q, D, None, mask)[0, 1], **EXACT)


def test_maxsim_of_own_documents_and_of_pairs() -> None:
    q_mask, d_mask = flags(5, 6), flags(5, 3, 9)
    theirs = torch.stack([plain(Q[i : i + 1], OWN[i], q_mask[i : i + 1], d_mask[i])[0] for i in range(5)])
    torch.testing.assert_close(lik.maxsim(Q, OWN, q_mask, d_mask), theirs, **EXACT)
    torch.testing.assert_close(lik.maxsim_pairs(Q, OWN[:, 1], q_mask, d_mask[:, 1]), theirs[:, 1], **EXACT)
    with pytest.raises(ValueError, match=r"Q: expected \[5, tokens, features\]"):
        lik.maxsim(Q[:4], OWN)


def packed(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, int32 offsets and the mask of as many from the first on."""
    lengths = mask.sum(1)
    front = torch.arange(values.shape[1]) < lengths[:, None]
    return values[front], torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), front


def test_packed_sets() -> None:
    (q, q_offsets, q_front), (d, d_offsets, d_front) = packed(Q, flags(5, 6)), packed(D, nothing_in_one(flags(7, 9)))
    theirs = plain(Q, D, q_front, d_front)
    torch.testing.assert_close(lik.maxsim_varlen(q, d, q_offsets, d_offsets, 6, 9), theirs, **EXACT)
    pair_q, pair_d = torch.tensor([3, 0, 3, 4, 0, 3]).int(), torch.tensor([6, 2, 1, 0, 2, 6]).int()
    ours = with_gradients(lik.score_pairs_packed, q, d, cu_seqlens_q=q_offsets, cu_seqlens_d=d_offsets,
                          pair_q_idx=pair_q, pair_d_idx=pair_d)  # fmt: skip
    torch.testing.assert_close(ours[0], theirs[pair_q.long(), pair_d.long()], **EXACT)
    assert ours[1].abs().sum() > 0
    none = torch.zeros(0, dtype=torch.int32)
    assert lik.score_pairs_packed(q, d, q_offsets, d_offsets, none, none).shape == (0,)
    torch.testing.assert_close(
        flash.flash_maxsim_varlen(q, d[: d_offsets[5]], q_offsets, d_offsets[:6], 6, 9),
        theirs.diagonal(),
        **EXACT,
    )


def test_padded_with_lengths() -> None:
    q_lengths, d_lengths = torch.tensor([6, 1, 3, 0, 2]), torch.randint(1, 10, (5, 3))
    d_lengths[0, 0] = 0
    theirs = torch.zeros(5, 3, dtype=torch.float64)
    for i, j in torch.cartesian_prod(torch.arange(5), torch.arange(3)).tolist():
        q, d = Q[i : i + 1, : q_lengths[i]], OWN[i, j : j + 1, : d_lengths[i, j]]
        theirs[i, j] = plain(q, d)[0, 0] if q.shape[1] and d.shape[1] else 0
    torch.testing.assert_close(lik.maxsim_padded(Q, OWN, q_lengths, d_lengths), theirs, **EXACT)
    torch.testing.assert_close(flash.flash_maxsim_rerank_padded(Q, OWN, q_lengths, d_lengths), theirs, **EXACT)
    own = flash.flash_maxsim_batched(Q, OWN, d_lengths.flatten(), shared_docs=False, query_lengths=q_lengths)
    torch.testing.assert_close(own, theirs, **EXACT)
    with pytest.raises(ValueError, match=r"doc_lengths: expected 0 to 9, got 10 to 10"):
        lik.maxsim_padded(Q, OWN, q_lengths, torch.full((5, 3), 10))


@pytest.mark.parametrize("chunk", [None, 2, 100])
def test_retrieve(chunk: int | None) -> None:
    mask = flags(7, 9)
    theirs = plain(Q, D, None, mask).topk(3)
    values, indices = lik.retrieve(Q, D, 3, None, mask, normalize=False, chunk=chunk)
    torch.testing.assert_close(values, theirs.values, **EXACT)
    assert torch.equal(indices, theirs.indices)
    values, indices = lik.retrieve(Q[0], D, 100, chunk=chunk, largest=False)
    assert torch.equal(indices, plain(Q, D)[0].argsort()) and values.shape == (7,)


def test_scorer() -> None:
    scorer = lik.MaxSimScorer(mask_pad_token=0)
    ids = torch.where(flags(7, 9), 5, 0)
    q_ids = torch.ones(5, 6)
    theirs = plain(Q, D, None, ids != 0)
    torch.testing.assert_close(scorer.forward_with_ids(Q * 2, D * 3, q_ids, ids), theirs, **EXACT)
    assert not scorer.score(Q.requires_grad_(), D).requires_grad
    Q.requires_grad_(False)
    assert torch.equal(scorer.retrieve(Q, D, 2)[1], plain(Q, D).topk(2).indices)
    with pytest.raises(ValueError, match="backward: expected one of None, auto, unified, lowmem"):
        lik.MaxSimScorer(backward="fast")
    with pytest.raises(ValueError, match="mask_pad_token: expected the id"):
        lik.MaxSimScorer().forward_with_ids(Q, D, q_ids, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_scores_are_float32(dtype: torch.dtype) -> None:
    q, d = Q.to(dtype), D.to(dtype)
    torch.testing.assert_close(lik.maxsim(q, d), plain(q.double(), d.double()).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flash.flash_maxsim(q[0], d), lik.maxsim(q, d)[0])


def test_flash_maxsim() -> None:
    lengths = torch.tensor([9, 1, 4, 0, 7, 2, 3])
    front = torch.arange(9) < lengths[:, None]
    theirs = plain(Q, D, None, front)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    rows = D[front]
    for ours in (
        flash.flash_maxsim(Q[0], D, lengths),
        flash.flash_maxsim(Q[0], rows, offsets, query_chunk_size=None, splitk=True),
        flash.flash_maxsim_persistent(Q[0], D, lengths, grid_factor=4),
        flash.flash_maxsim_packed(Q[0], rows, offsets),
        flash.flash_maxsim_rerank(Q[0], rows, offsets, 9),
        flash.flash_maxsim_rerank_direct(Q[0], D.flatten(0, 1), torch.arange(7).int() * 9, lengths.int(), 9),
    ):
        torch.testing.assert_close(ours, theirs[0], **EXACT)
    torch.testing.assert_close(flash.flash_maxsim_batched(Q, D, lengths), theirs, **EXACT)
    torch.testing.assert_close(flash.flash_maxsim_batched_train(Q, D, True, lengths), theirs, **EXACT)
    torch.testing.assert_close(flash.flash_maxsim_train(Q[0], D), plain(Q, D)[0], **EXACT)
    values, indices = flash.flash_maxsim_topk(Q[0], D, 2, lengths, n_candidates=3)
    assert torch.equal(indices, theirs[0].topk(2).indices) and values[0] == theirs[0].max()
    with pytest.raises(ValueError, match=r"doc_lengths: expected the offsets"):
        flash.flash_maxsim(Q[0], rows)


def test_flash_maxsim_of_int8() -> None:
    package = pytest.importorskip("flash_maxsim")
    q, d, lengths = Q[0].float(), D.float(), torch.tensor([9, 1, 4, 0, 7, 2, 3])
    for sets_, ours, theirs in (
        (d, flash.quantize_int8_symmetric, package.quantize_int8_symmetric),
        (q, flash.quantize_query_int8, package.quantize_query_int8),
    ):
        for a, b in zip(ours(sets_), theirs(sets_), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    (d8, d_scale), (q8, q_scale) = flash.quantize_int8_symmetric(d), flash.quantize_query_int8(q)
    front = torch.arange(9) < lengths[:, None]
    decoded, query = d8.double() * d_scale.double(), q8.double() * q_scale.double()[:, None]
    theirs = plain(q.double()[None], decoded, None, front)[0].float()
    ours = flash.flash_maxsim_int8_symmetric(q.requires_grad_(), d8, d_scale, lengths)
    torch.testing.assert_close(ours, theirs)
    theirs = plain(query[None], decoded, None, front)[0].float()
    for ours in (
        flash.flash_maxsim_int8x8(q, d8, d_scale, doc_lengths=lengths),
        flash.flash_maxsim_int8x8(None, d8, d_scale[..., 0], q8, q_scale, lengths, 64),
    ):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="Q: expected the query"):
        flash.flash_maxsim_int8x8(None, d8, d_scale)


def test_flash_maxsim_pairs() -> None:
    theirs = plain(Q, D[:5]).diagonal()
    torch.testing.assert_close(flash.flash_maxsim_pairs(Q, D[:5]), theirs, **EXACT)
    q, d = [Q[i, : 1 + i] for i in range(5)], [D[i, : 9 - i] for i in range(5)]
    theirs = torch.stack([plain(a[None], b[None])[0, 0] for a, b in zip(q, d, strict=True)])
    torch.testing.assert_close(flash.flash_maxsim_pairs(q, d), theirs, **EXACT)
    rows = flash.pack_pairs(q, d)
    assert rows[2].dtype == torch.int32 and rows[4:] == (5, 9)
    torch.testing.assert_close(flash.flash_maxsim_varlen(*rows), theirs, **EXACT)
    lengths = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([9, 8, 7, 6, 5])
    torch.testing.assert_close(flash.flash_maxsim_pairs_dense(Q, D[:5], *lengths), theirs, **EXACT)


def test_patches_under_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lik, "_patches", {})
    done: list[str] = []

    class Patch:
        def undo(self) -> None:
            done.append("undone")

    monkeypatch.setattr(lik, "_pylate", lambda **options: done.append(str(options)) or Patch())
    lik.patch_pylate()
    lik.patch_pylate()
    lik.unpatch_pylate()
    lik.unpatch_pylate()
    assert done == ["{'drop_masked': True}", "undone"]


@pytest.mark.parametrize("of", ["tensor", "token"])
def test_fp8(of: str) -> None:
    """Next to what the codes say, in float64; and those are near what was encoded."""
    quantize, decode = (getattr(fp8, f"{verb}_fp8_per_{of}") for verb in ("quantize", "dequantize"))
    q_mask, d_mask = nothing_in_one(flags(5, 6)), nothing_in_one(flags(7, 9))
    (q, q_scale), (d, d_scale) = quantize(Q), quantize(D)
    assert q.dtype == d.dtype == torch.float8_e4m3fn
    assert q_scale.shape == (() if of == "tensor" else Q.shape[:2]) and q_scale.dtype == torch.float32
    torch.testing.assert_close(decode(q, q_scale), Q.float(), rtol=2**-4, atol=2**-9 * float(q_scale.max()))
    decoded = decode(q, q_scale).double(), decode(d, d_scale).double()
    scores = fp8.maxsim_inference_fp8(q, d, scale_Q=q_scale, scale_D=d_scale, q_mask=q_mask, d_mask=d_mask)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), lik.maxsim(*decoded, q_mask, d_mask), rtol=1e-6, atol=1e-6)
    if of == "token":
        q_scale, d_scale = q_scale[1], d_scale[2]
    masks = {"q_mask": q_mask[1], "d_mask": d_mask[2]}
    one = fp8.maxsim_inference_fp8(q[1], d[2], scale_Q=q_scale, scale_D=d_scale, **masks)
    torch.testing.assert_close(one, scores[1, 2])


def test_fp8_of_nothing() -> None:
    for quantize in (fp8.quantize_fp8_per_tensor, fp8.quantize_fp8_per_token):
        codes, scale = quantize(torch.zeros(2, 3, 8))
        assert codes.float().eq(0).all() and scale.gt(0).all() and scale.isfinite().all()
    codes, scale = fp8.quantize_fp8_per_tensor(torch.zeros(0, 8))
    assert codes.shape == (0, 8) and scale == 1


def test_results_of_fp8_are_theirs() -> None:
    """The same codes and scales; scores as near as its plain path in bfloat16 is."""
    theirs: Any = pytest.importorskip("late_interaction_kernels.fp8")
    for of in ("tensor", "token"):
        name = f"quantize_fp8_per_{of}"
        (q, q_scale), (d, d_scale) = getattr(fp8, name)(Q.float()), getattr(fp8, name)(D.float())
        for ours, their in zip((q, q_scale), getattr(theirs, name)(Q.float()), strict=True):
            torch.testing.assert_close(ours.float(), their.float())
        arguments = {"scale_Q": q_scale, "scale_D": d_scale}
        theirs._WARNED_FP8_FALLBACK = False
        with pytest.warns(RuntimeWarning, match="bf16"):
            their = theirs.maxsim_inference_fp8(q, d, **arguments)
        torch.testing.assert_close(fp8.maxsim_inference_fp8(q, d, **arguments), their.float(), rtol=2e-2, atol=5e-2)


SUBMODULES = {
    "late_interaction_kernels": "late_interaction_kernels.score_pairs",
    "late_interaction_kernels_fp8": "late_interaction_kernels.fp8",
}


@pytest.mark.parametrize("name", ["late_interaction_kernels", "late_interaction_kernels_fp8", "flash_maxsim"])
def test_signatures_are_theirs(name: str) -> None:
    """Of every name that both have: the same arguments in the same order with the same defaults."""
    theirs: Any = pytest.importorskip(name.removesuffix("_fp8"))
    ours = importlib.import_module(f"setemb_kernels.integrations.{name}")
    submodule = importlib.import_module(SUBMODULES[name]) if name in SUBMODULES else None
    compared = 0
    for function in ours.__all__:
        their = getattr(submodule, function, None) or getattr(theirs, function, None)
        if their is None:
            continue
        pairs = [(their, getattr(ours, function))]
        if isinstance(their, type):
            methods = ("__init__", "forward", "score", "retrieve", "forward_with_ids")
            pairs = [(getattr(their, m), getattr(pairs[0][1], m)) for m in methods]
        for a, b in pairs:
            seen = [[(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in (a, b)]
            assert seen[0] == seen[1], function
            compared += 1
    assert compared >= (5 if name.endswith("fp8") else 10)


def test_results_are_theirs() -> None:
    """Their plain functions, which run without a GPU."""
    reference: Any = pytest.importorskip("late_interaction_kernels.reference")
    q_mask, d_mask = nothing_in_one(flags(5, 6)), nothing_in_one(flags(7, 9))
    for normalize in (False, True):
        theirs = with_gradients(reference.maxsim_reference, Q, D, q_mask=q_mask, d_mask=d_mask, normalize=normalize)
        ours = with_gradients(lik.maxsim, Q, D, q_mask=q_mask, d_mask=d_mask, normalize=normalize)
        torch.testing.assert_close(ours, theirs, **EXACT)
    (q, q_offsets, _), (d, d_offsets, _) = packed(Q, flags(5, 6)), packed(D, nothing_in_one(flags(7, 9)))
    q, d = q.float(), d.float()
    torch.testing.assert_close(
        lik.maxsim_varlen(q, d, q_offsets, d_offsets), reference.maxsim_reference_varlen(q, d, q_offsets, d_offsets)
    )
    pairs = torch.tensor([3, 0, 3, 4]), torch.tensor([6, 2, 1, 0])
    theirs = reference.maxsim_reference_scatter(q, d, q_offsets, d_offsets, *pairs)
    torch.testing.assert_close(lik.score_pairs_packed(q, d, q_offsets, d_offsets, *pairs), theirs)


def test_results_of_flash_maxsim_are_theirs() -> None:
    theirs: Any = pytest.importorskip("flash_maxsim")
    lengths = torch.tensor([9, 1, 4, 3, 7, 2, 3])
    torch.testing.assert_close(flash.flash_maxsim(Q[0], D, lengths), theirs.maxsim_naive(Q[0], D, lengths), **EXACT)
    torch.testing.assert_close(
        flash.flash_maxsim_batched(Q, D, lengths), theirs.maxsim_naive_batched(Q, D, lengths), **EXACT
    )
