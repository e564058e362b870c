"""Encoders that torch compiles for training."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """``torch.compile(function)``, for sizes that differ from call to call: other lengths of captions compile nothing.

    The function is compiled and not its module, whose parameters keep their names. What torch cannot follow (the GRU's
    loop over words, a selection of valid tokens) runs as it is, between compiled parts.

    Raises:
        ValueError: torch cannot compile here; from the first call, or from here.
    """
    try:
        run: Any = torch.compile(function, dynamic=True)
    except RuntimeError as error:  # a release of Python that it does not know
        raise _refusal(error) from error

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise _refusal(error) from error
        except Exception as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise _refusal(error) from error
            raise

    return cast(F, call)


def _refusal(error: Exception) -> ValueError:
    lines = (line.strip() for line in str(error).splitlines())
    reason = next((line for line in lines if line and "raised:" not in line), type(error).__name__)
    return ValueError(f"trainer.compile=true: torch cannot compile here ({reason}); train with trainer.compile=false")
