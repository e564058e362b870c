"""Cross-modal retrieval with sets of embeddings: models, training, evaluation, index and search."""

from setemb.model import SetEmbedder
from setemb_kernels import __version__

__all__ = ["SetEmbedder", "__version__"]
