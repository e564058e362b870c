"""`precompile_set_similarity` away from a GPU; what it launches says `test_launch`, that it suffices `triton_cases`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from setemb_kernels import precompile_set_similarity


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "cosine"}, "kind: expected one of smooth_chamfer.* got 'cosine'"),
        ({"features": 0}, "features: expected an integer > 0, got 0"),
        ({"dtype": torch.int8}, "dtype: expected bfloat16, float16 or float32, got torch.int8"),
        ({"reduction": "max"}, "reduction: expected 'sum' or 'mean', got 'max'"),
        ({"device": "cpu"}, "device: expected a CUDA device, got cpu"),
    ],
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    arguments = {"kind": "maxsim", "features": 64, "dtype": torch.bfloat16} | changed
    with pytest.raises(ValueError, match=message):
        precompile_set_similarity(**arguments)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="triton cannot serve CUDA devices: no CUDA device"):
        precompile_set_similarity("maxsim", 64, torch.bfloat16)
