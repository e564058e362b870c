"""Cross-modal retrieval with sets of embeddings: models, training, evaluation, index and search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from setemb.index import SetIndex
    from setemb.model import SetEmbedder
    from setemb_kernels import __version__

__all__ = ["SetEmbedder", "SetIndex", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports torch when something of it is asked for: the command line's help does without."""
    if name == "SetEmbedder":
        from setemb.model import SetEmbedder

        return SetEmbedder
    if name == "SetIndex":
        from setemb.index import SetIndex

        return SetIndex
    if name == "__version__":
        from setemb_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
