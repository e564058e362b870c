from __future__ import annotations

from typing import Any

import numpy as np
import torch


def convert_to_tensor(x: Any) -> torch.Tensor:
    if isinstance(x, list) and x and isinstance(x[0], torch.Tensor):
        return torch.stack(x)
    return x if isinstance(x, torch.Tensor) else torch.from_numpy(np.asarray(x, dtype=np.float32))
