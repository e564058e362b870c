"""How results lie in memory."""

from __future__ import annotations

from torch import Tensor


def empty_like_slots(q: Tensor, features: int) -> Tensor:
    """``[B, H, K, features]`` in the memory order of q: heads outermost where they are so in q, else contiguous.

    So a caller that works head by head gets back what it can go on with, without a copy. Heads are outermost, too,
    where one item of slots is expanded over all items.
    """
    B, H, K, _ = q.shape
    heads_first = q.transpose(0, 1).is_contiguous() and not q.is_contiguous()
    heads_first = heads_first or (B > 1 and q.numel() != 0 and q.stride(0) == 0 and q[0].is_contiguous())
    return q.new_empty(H, B, K, features).transpose(0, 1) if heads_first else q.new_empty(B, H, K, features)
