"""Building blocks of a set-embedding model: encoders and the set prediction module."""

from setemb.modules.image import PictureEncoder, RegionEncoder
from setemb.modules.slots import SetOutput, SetPrediction, SlotAttention
from setemb.modules.text import FeatureTextEncoder, GRUTextEncoder, TransformerTextEncoder

__all__ = [
    "FeatureTextEncoder",
    "GRUTextEncoder",
    "PictureEncoder",
    "RegionEncoder",
    "SetOutput",
    "SetPrediction",
    "SlotAttention",
    "TransformerTextEncoder",
]
