"""PIE-Net: K embeddings of an item by K attentions over its local features, the module that set prediction replaced."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from setemb.modules.dropout import Dropout
from setemb.modules.linear import Linear
from setemb.modules.set_prediction import SetOutput
from setemb.modules.slot_attention import check_tokens


class PIENet(nn.Module):
    """Polysemous instance embeddings.

    Each of K heads has its own attention over the tokens, and its residual is added to the one global vector::

        A = softmax over tokens of W_2 tanh(W_1 local)          [K, T]
        r = Dropout(sigmoid(W_3 (A local)))                     [K, dim]
        embeddings = unit(LN(global + r))

    The softmax is over the tokens, not over the slots as in `SetPrediction`: nothing makes two heads look elsewhere. A
    masked token contributes nothing, whatever it holds; an item without a valid token gathers 0.

    Args:
        dim_local: features of a local token.
        dim_global: features of the global vector; a linear projection is added where it is not ``dim``.
        dim: features of an embedding.
        num_slots: K.
        dropout: on the residual.

    Source: Song, Soleymani, "Polysemous visual-semantic embedding for cross-modal retrieval" (PVSE), CVPR 2019.
    """

    def __init__(self, dim_local: int, dim_global: int, dim: int, num_slots: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        sizes = {"dim_local": dim_local, "dim_global": dim_global, "dim": dim, "num_slots": num_slots}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.dim_local, self.dim_global = dim_local, dim_global
        hidden = max(1, dim_local // 2)
        self.hidden = Linear(dim_local, hidden, bias=False)
        self.attention = Linear(hidden, num_slots, bias=False)
        self.residual = Linear(dim_local, dim)
        self.dropout = Dropout(dropout)
        self.project_global = nn.Identity() if dim_global == dim else Linear(dim_global, dim)
        self.norm = nn.LayerNorm(dim)
        for layer in (self.hidden, self.attention, self.residual):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.residual.bias)

    def forward(
        self, local: Tensor, global_: Tensor, mask: Tensor | None = None, return_attention: bool = False
    ) -> SetOutput:
        """Embeds a batch; arguments and errors as in `SetPrediction.forward`.

        Returns:
            ``slots`` are the residuals r, ``attention`` is A, ``[B, 1, K, T]``: it sums to 1 over T.
        """
        check_tokens("local", local, self.dim_local, mask)
        if global_.shape != (local.shape[0], self.dim_global):
            raise ValueError(
                f"global_ must have shape [{local.shape[0]}, {self.dim_global}], got {list(global_.shape)}"
            )
        if mask is not None:
            local = local.masked_fill(~mask[..., None], 0)  # 0 * NaN would be NaN
        logits = self.attention(self.hidden(local).tanh()).mT  # [B, K, T]
        if mask is not None:
            valid = mask[:, None]
            # The lowest finite value: a softmax over nothing but -inf is NaN.
            logits = logits.masked_fill(~valid, -3e4)
            attention = logits.softmax(-1).masked_fill(~valid, 0)
        else:
            attention = logits.softmax(-1)
        residual = self.dropout(self.residual(attention.to(local.dtype) @ local).sigmoid())
        out = self.norm(self.project_global(global_)[:, None] + residual)
        return SetOutput(functional.normalize(out, dim=-1), residual, attention[:, None] if return_attention else None)
