"""The call signatures of the package `late-interaction-kernels`, on every device that `setemb_kernels` serves.

``import setemb_kernels.integrations.late_interaction_kernels as late_interaction_kernels``

Scores are float32 (float64 of float64). Masks are bool, True = valid; a document or query without a valid token scores
0. ``normalize=True`` makes every vector of unit length first. How gradients are made is not for the caller to say:
``backward`` is checked and makes no difference. Longest lengths are not needed; ``max_seqlen_q`` and ``max_seqlen_d``
are there to be given.

FP8 is in `late_interaction_kernels_fp8`. What is not here: PLAID and the fused head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from setemb_kernels.integrations import _sets
from setemb_kernels.integrations._patch import Patch
from setemb_kernels.integrations.colpali_engine import patch_colpali_engine as _colpali_engine
from setemb_kernels.integrations.pylate import patch_pylate as _pylate

__all__ = [
    "MaxSimScorer",
    "maxsim",
    "maxsim_padded",
    "maxsim_pairs",
    "maxsim_varlen",
    "patch_colpali_engine",
    "patch_pylate",
    "retrieve",
    "score_pairs_packed",
    "unpatch_colpali_engine",
    "unpatch_pylate",
]

BACKWARDS = (None, "auto", "unified", "lowmem")


def maxsim(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    backward: str | None = None,
) -> Tensor:
    """MaxSim of all pairs, or of each query with its own documents.

    Args:
        Q: ``[Nq, Lq, d]`` or ``[Lq, d]``.
        D: ``[Nd, Ld, d]``, ``[Ld, d]``, or ``[Nq, C, Ld, d]``, C documents for each query.
        q_mask, d_mask: bool, of the shapes of Q and D without the last.

    Returns:
        ``[Nq, Nd]``, less the axes that Q and D lack, or ``[Nq, C]``.
    """
    _check_backward(backward)
    if D.dim() == 4:
        if Q.dim() != 3 or len(Q) != len(D):
            raise ValueError(
                f"Q: expected [{len(D)}, tokens, features] beside documents of each query {list(D.shape)},"
                f" got {list(Q.shape)}"
            )
        candidates = _sets.own_candidates(D.shape[0], D.shape[1], D.device)
        d_mask = None if d_mask is None else d_mask.flatten(0, 1)
        return _score(Q, D.flatten(0, 1), q_mask, d_mask, normalize, candidates=candidates)
    queries, documents = (_batch(value, value.dim() == 2) for value in (Q, D))
    q_mask, d_mask = (None if mask is None else _batch(mask, mask.dim() == 1) for mask in (q_mask, d_mask))
    scores = _score(queries, documents, q_mask, d_mask, normalize)
    if D.dim() == 2:
        scores = scores[:, 0]
    return scores[0] if Q.dim() == 2 else scores


def maxsim_pairs(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    backward: str | None = None,
) -> Tensor:
    """Query i with document i, ``[B, Lq, d]`` and ``[B, Ld, d]`` to ``[B]``."""
    _check_backward(backward)
    return _score(Q, D, q_mask, d_mask, normalize, pairs="paired")


def maxsim_varlen(
    Q_packed: Tensor,
    D_packed: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_d: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_d: int | None = None,
) -> Tensor:
    """All pairs ``[Nq, Nd]`` of packed sets: rows ``[X, d]``, offsets ``[Nq + 1]``; ``[Y, d]``, ``[Nd + 1]``."""
    return _wide(_sets.Sets(Q_packed, cu_seqlens_q), _sets.Sets(D_packed, cu_seqlens_d))


def maxsim_padded(
    queries: Tensor,
    documents: Tensor,
    query_lengths: Tensor,
    doc_lengths: Tensor,
    *,
    validate: bool = False,
) -> Tensor:
    """``[B, Lq, d]`` with lengths ``[B]`` and each one's own documents ``[B, C, Ld, d]`` with lengths ``[B, C]`` to
    ``[B, C]``. Lengths are always checked, `validate` or not.
    """
    for name, lengths, longest in (
        ("query_lengths", query_lengths, queries.shape[1]),
        ("doc_lengths", doc_lengths, documents.shape[2]),
    ):
        if lengths.numel() and not (int(lengths.min()) >= 0 and int(lengths.max()) <= longest):
            raise ValueError(f"{name}: expected 0 to {longest}, got {int(lengths.min())} to {int(lengths.max())}")
    return maxsim(queries, documents, _valid(query_lengths, queries), _valid(doc_lengths, documents))


def score_pairs_packed(
    Q_packed: Tensor,
    D_packed: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_d: Tensor,
    pair_q_idx: Tensor,
    pair_d_idx: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_d: int | None = None,
) -> Tensor:
    """Of packed sets the pairs (query ``pair_q_idx[p]``, document ``pair_d_idx[p]``), ``[P]``."""
    queries, pairs = len(cu_seqlens_q) - 1, len(pair_q_idx)
    query = pair_q_idx.long()
    order = query.argsort(stable=True)
    counts = query.bincount(minlength=queries)
    start = counts.cumsum(0) - counts
    place = torch.arange(pairs, device=query.device) - start[query[order]]
    candidates = query.new_full((queries, int(counts.max()) if pairs else 0), -1)
    candidates[query[order], place] = pair_d_idx.long()[order]
    scores = _wide(_sets.Sets(Q_packed, cu_seqlens_q), _sets.Sets(D_packed, cu_seqlens_d), candidates=candidates)
    return scores[query, torch.empty_like(place).scatter_(0, order, place)]


def retrieve(
    Q: Tensor,
    D: Tensor,
    top_k: int,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = True,
    chunk: int | None = None,
    largest: bool = True,
    sorted: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scores and indices of the `top_k` documents of each query, `chunk` documents at a time."""
    if top_k <= 0:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    with torch.no_grad():
        D = _batch(D, D.dim() == 2)
        d_mask = None if d_mask is None else _batch(d_mask, d_mask.dim() == 1)
        size, values, indices = chunk or len(D), [], []
        for first in range(0, len(D), size):
            part = slice(first, first + size)
            scores = maxsim(Q, D[part], q_mask, None if d_mask is None else d_mask[part], normalize=normalize)
            best = scores.topk(min(top_k, scores.shape[-1]), largest=largest)
            values.append(best.values)
            indices.append(best.indices + first)
        found = torch.cat(values, -1).topk(min(top_k, len(D)), largest=largest, sorted=sorted)
        return found.values, torch.cat(indices, -1).gather(-1, found.indices)


class MaxSimScorer(nn.Module):
    """`maxsim` as a module without parameters; unit vectors unless ``normalize=False``."""

    def __init__(
        self, *, normalize: bool = True, backward: str | None = "auto", mask_pad_token: int | None = None
    ) -> None:
        super().__init__()
        _check_backward(backward)
        self.normalize, self.backward, self.mask_pad_token = normalize, backward, mask_pad_token

    def forward(self, Q: Tensor, D: Tensor, q_mask: Tensor | None = None, d_mask: Tensor | None = None) -> Tensor:
        return maxsim(Q, D, q_mask, d_mask, normalize=self.normalize)

    def score(self, Q: Tensor, D: Tensor, q_mask: Tensor | None = None, d_mask: Tensor | None = None) -> Tensor:
        """The same without gradients."""
        with torch.no_grad():
            scores: Tensor = self(Q, D, q_mask, d_mask)
            return scores

    def retrieve(
        self,
        Q: Tensor,
        D: Tensor,
        top_k: int,
        q_mask: Tensor | None = None,
        d_mask: Tensor | None = None,
        *,
        chunk: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        return retrieve(Q, D, top_k, q_mask, d_mask, normalize=self.normalize, chunk=chunk)

    def forward_with_ids(self, Q: Tensor, D: Tensor, q_ids: Tensor, d_ids: Tensor) -> Tensor:
        """Tokens whose id is ``mask_pad_token`` are masked."""
        if self.mask_pad_token is None:
            raise ValueError("mask_pad_token: expected the id of padding, got None")
        scores: Tensor = self(Q, D, q_ids != self.mask_pad_token, d_ids != self.mask_pad_token)
        return scores


_patches: dict[str, Patch] = {}


def patch_pylate() -> None:
    """`setemb_kernels.integrations.patch_pylate`, until `unpatch_pylate`."""
    _install("pylate", lambda: _pylate(drop_masked=True))  # as that package has it


def unpatch_pylate() -> None:
    _remove("pylate")


def patch_colpali_engine() -> None:
    """`setemb_kernels.integrations.patch_colpali_engine`, until `unpatch_colpali_engine`."""
    _install("colpali_engine", _colpali_engine)


def unpatch_colpali_engine() -> None:
    _remove("colpali_engine")


def _install(package: str, patch: Callable[[], Patch]) -> None:
    if package not in _patches:
        _patches[package] = patch()


def _remove(package: str) -> None:
    if package in _patches:
        _patches.pop(package).undo()


def _score(
    Q: Tensor, D: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, normalize: bool, **options: Any
) -> Tensor:
    if normalize:
        Q, D = (functional.normalize(value, dim=-1) for value in (Q, D))
    return _wide(_sets.Sets(Q), _sets.Sets(D), x_mask=_bool(q_mask), y_mask=_bool(d_mask), **options)


def _wide(x: _sets.Sets, y: _sets.Sets, **options: Any) -> Tensor:
    """In float32 at least."""
    return _sets.similarity(x, y, out_dtype=_sets.wide(x), **options)


def _bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()


def _batch(value: Tensor, alone: bool) -> Tensor:
    return value[None] if alone else value


def _valid(lengths: Tensor, sets: Tensor) -> Tensor:
    return torch.arange(sets.shape[-2], device=sets.device) < lengths[..., None].to(sets.device)


def _check_backward(backward: str | None) -> None:
    if backward not in BACKWARDS:
        raise ValueError(f"backward: expected one of {', '.join(map(str, BACKWARDS))}, got {backward!r}")
