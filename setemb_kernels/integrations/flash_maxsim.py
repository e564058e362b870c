"""The call signatures of the package `flash-maxsim`, on every device that `setemb_kernels` serves, with gradients.

``import setemb_kernels.integrations.flash_maxsim as flash_maxsim``

Scores are float32 (float64 of float64), of inputs in their own type; there float32 is rounded to float16 first. A
document or query without tokens scores 0. How work is cut (``query_chunk_size``, ``splitk``, ``pad_lq``,
``grid_factor``) and longest lengths are not for the caller to say: they are there to be given, and make no difference.

What is not here: int8 with an offset (affine), training with int8, and the Chamfer distance of points, which is a
Euclidean one; ``set_similarity(x, y, "chamfer")`` is that of dot products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from setemb_kernels.integrations import _sets
from setemb_kernels.integrations.late_interaction_kernels import _valid, _wide, maxsim, maxsim_pairs
from setemb_kernels.ops.set_similarity.op import set_similarity

__all__ = [
    "flash_maxsim",
    "flash_maxsim_batched",
    "flash_maxsim_batched_train",
    "flash_maxsim_int8_symmetric",
    "flash_maxsim_int8x8",
    "flash_maxsim_packed",
    "flash_maxsim_pairs",
    "flash_maxsim_pairs_dense",
    "flash_maxsim_persistent",
    "flash_maxsim_rerank",
    "flash_maxsim_rerank_direct",
    "flash_maxsim_rerank_padded",
    "flash_maxsim_topk",
    "flash_maxsim_train",
    "flash_maxsim_varlen",
    "pack_docs",
    "pack_pairs",
    "quantize_int8_symmetric",
    "quantize_query_int8",
]


def flash_maxsim(
    Q: Tensor,
    D: Tensor,
    doc_lengths: Tensor | None = None,
    query_chunk_size: int | None = 128,
    splitk: bool = False,
) -> Tensor:
    """One query ``[Lq, d]`` with documents ``[B, Ld, d]`` of ``doc_lengths [B]``, or packed ``[Y, d]`` with their
    offsets ``[B + 1]`` as ``doc_lengths``, to ``[B]``.
    """
    if D.dim() == 2:
        if doc_lengths is None:
            raise ValueError("doc_lengths: expected the offsets [B + 1] of packed documents, got None")
        return flash_maxsim_packed(Q, D, doc_lengths)
    return maxsim(Q, D, d_mask=_mask(doc_lengths, D))


def flash_maxsim_batched(
    Q: Tensor,
    D: Tensor,
    doc_lengths: Tensor | None = None,
    shared_docs: bool = True,
    query_lengths: Tensor | None = None,
    pad_lq: bool = True,
    query_chunk_size: int | None = 128,
) -> Tensor:
    """``[Nq, Lq, d]`` with documents of all, ``[B, Ld, d]``, or (``shared_docs=False``) of each, ``[Nq, B, Ld, d]``, to
    ``[Nq, B]``; lengths ``[Nq]`` of queries, ``[B]`` or ``[Nq * B]`` of documents.
    """
    if not shared_docs and doc_lengths is not None:
        doc_lengths = doc_lengths.view(D.shape[:2])
    return maxsim(Q, D, _mask(query_lengths, Q), _mask(doc_lengths, D))


def flash_maxsim_batched_train(
    Q: Tensor,
    D: Tensor,
    shared_docs: bool = True,
    doc_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
) -> Tensor:
    """`flash_maxsim_batched`, in the order of arguments of training."""
    return flash_maxsim_batched(Q, D, doc_lengths, shared_docs, query_lengths)


def flash_maxsim_train(Q: Tensor, D: Tensor) -> Tensor:
    """`flash_maxsim` of documents of one length."""
    return flash_maxsim(Q, D)


def flash_maxsim_persistent(Q: Tensor, D: Tensor, doc_lengths: Tensor | None = None, grid_factor: int = 2) -> Tensor:
    """One query or many, ``[Lq, d]`` or ``[Nq, Lq, d]``, with documents ``[B, Ld, d]``."""
    return maxsim(Q, D, d_mask=_mask(doc_lengths, D))


def flash_maxsim_pairs(q_embs: Tensor | Sequence[Tensor], d_embs: Tensor | Sequence[Tensor]) -> Tensor:
    """Query i with document i, of two tensors or two lists, ``[N]``."""
    if isinstance(q_embs, Tensor) and isinstance(d_embs, Tensor):
        return maxsim_pairs(q_embs, d_embs)
    return _wide(_sets.of_rows(list(q_embs)), _sets.of_rows(list(d_embs)), pairs="paired")


def flash_maxsim_pairs_dense(
    Q: Tensor, D: Tensor, q_lengths: Tensor | None = None, doc_lengths: Tensor | None = None
) -> Tensor:
    """``[B, Lq, d]`` and ``[B, Ld, d]`` with lengths ``[B]`` to ``[B]``."""
    return maxsim_pairs(Q, D, _mask(q_lengths, Q), _mask(doc_lengths, D))


def flash_maxsim_varlen(
    Q_packed: Tensor,
    D_packed: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_d: Tensor,
    max_seqlen_q: int,
    max_seqlen_d: int,
) -> Tensor:
    """Packed query i with packed document i, ``[N]``."""
    return _wide(_sets.Sets(Q_packed, cu_seqlens_q), _sets.Sets(D_packed, cu_seqlens_d), pairs="paired")


def flash_maxsim_packed(
    Q: Tensor,
    D_packed: Tensor,
    cu_seqlens_d: Tensor,
    max_seqlen_d: int | None = None,
    query_chunk_size: int | None = 128,
) -> Tensor:
    """One query ``[Lq, d]`` with packed documents, ``[B]``."""
    return _wide(_sets.Sets(Q[None]), _sets.Sets(D_packed, cu_seqlens_d))[0]


def flash_maxsim_rerank(Q: Tensor, D_packed: Tensor, cu_seqlens_d: Tensor, max_seqlen_d: int) -> Tensor:
    """`flash_maxsim_packed`."""
    return flash_maxsim_packed(Q, D_packed, cu_seqlens_d)


def flash_maxsim_rerank_direct(
    Q: Tensor, batch_tensor: Tensor, doc_offsets: Tensor, doc_lengths: Tensor, max_seqlen_d: int
) -> Tensor:
    """One query with documents that lie anywhere in ``[X, d]``, ``[B]``. Their rows are gathered: one copy of them."""
    lengths = doc_lengths.long()
    ends = lengths.cumsum(0)
    within = torch.arange(int(lengths.sum()), device=lengths.device) - (ends - lengths).repeat_interleave(lengths)
    rows = batch_tensor[doc_offsets.long().repeat_interleave(lengths) + within]
    return flash_maxsim_packed(Q, rows, torch.nn.functional.pad(ends, (1, 0)))


def flash_maxsim_rerank_padded(
    queries: Tensor, documents: Tensor, query_lengths: Tensor | None = None, doc_lengths: Tensor | None = None
) -> Tensor:
    """``[B, Lq, d]`` and each one's own documents ``[B, C, Ld, d]`` to ``[B, C]``."""
    return maxsim(queries, documents, _mask(query_lengths, queries), _mask(doc_lengths, documents))


def flash_maxsim_topk(
    Q: Tensor,
    D: Tensor,
    k: int,
    doc_lengths: Tensor | None = None,
    n_candidates: int | None = None,
    D_int8: Tensor | None = None,
    scales: Tensor | None = None,
    mins: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores and indices of the k best of ``[B, Ld, d]`` for one query: exact, so candidates and int8 are not used."""
    found = flash_maxsim(Q, D, doc_lengths).topk(k)
    return found.values, found.indices


def quantize_int8_symmetric(D: Tensor) -> tuple[Tensor, Tensor]:
    """Documents ``[B, Ld, d]`` as int8 and the scale ``[B, Ld, 1]`` of each token, float16."""
    scale = D.abs().amax(-1, keepdim=True).float().clamp(min=1e-8) / 127
    return (D / scale.to(D.dtype)).round().clamp(-127, 127).to(torch.int8), scale.half()


def quantize_query_int8(Q: Tensor) -> tuple[Tensor, Tensor]:
    """A query ``[Lq, d]`` as int8 and the scale ``[Lq]`` of each token, float16."""
    largest = Q.float().abs().amax(-1, keepdim=True).clamp(min=1e-8)
    return (Q.float() / largest * 127).round().clamp(-127, 127).to(torch.int8), (largest / 127).half().squeeze(-1)


def flash_maxsim_int8_symmetric(
    Q: Tensor, D_int8: Tensor, scales: Tensor, doc_lengths: Tensor | None = None, query_chunk_size: int | None = 128
) -> Tensor:
    """One query ``[Lq, d]`` with documents of int8 and their scales ``[B, Ld]`` or ``[B, Ld, 1]``, to ``[B]``."""
    return _codes(Q, None, D_int8, scales, doc_lengths)


def flash_maxsim_int8x8(
    Q: Tensor | None,
    D_int8: Tensor,
    d_scales: Tensor,
    Q_int8: Tensor | None = None,
    q_scales: Tensor | None = None,
    doc_lengths: Tensor | None = None,
    query_chunk_size: int | None = 128,
) -> Tensor:
    """The same with the query in int8 too: ``Q_int8`` and ``q_scales``, or made of Q."""
    if Q_int8 is None or q_scales is None:
        if Q is None:
            raise ValueError("Q: expected the query [Lq, d], or Q_int8 and q_scales, got None")
        Q_int8, q_scales = quantize_query_int8(Q)
    return _codes(Q_int8, q_scales, D_int8, d_scales, doc_lengths)


def _codes(
    query: Tensor, query_scale: Tensor | None, documents: Tensor, scale: Tensor, lengths: Tensor | None
) -> Tensor:
    """The package knows no gradient here."""
    with torch.no_grad():
        return set_similarity(
            query[None],
            documents,
            "maxsim",
            x_scale=None if query_scale is None else query_scale[None],
            y_scale=scale.view(documents.shape[:2]),
            y_mask=_mask(lengths, documents),
        )[0]


def pack_docs(d_embs: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
    """A list of ``[L, d]`` as rows ``[Y, d]``, int32 offsets ``[B + 1]`` and the longest length."""
    packed = _sets.of_rows(list(d_embs))
    assert packed.offsets is not None
    return packed.vectors, packed.offsets.to(torch.int32), max(map(len, d_embs))


def pack_pairs(q_embs: Sequence[Tensor], d_embs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Two lists as rows, rows, offsets, offsets, longest, longest."""
    (q, q_offsets, q_longest), (d, d_offsets, d_longest) = pack_docs(q_embs), pack_docs(d_embs)
    return q, d, q_offsets, d_offsets, q_longest, d_longest


def _mask(lengths: Tensor | None, sets: Tensor) -> Tensor | None:
    return None if lengths is None else _valid(lengths, sets)
