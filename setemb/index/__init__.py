"""A searchable collection of sets of embeddings, kept in a folder: `SetIndex`; docs/index-format.md has the format."""

from setemb.index.embed import embed_images, embed_texts
from setemb.index.index import Item, SearchResult, SetIndex

__all__ = ["Item", "SearchResult", "SetIndex", "embed_images", "embed_texts"]
