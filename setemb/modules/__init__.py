"""Building blocks of a set-embedding model: encoders and the set prediction module."""

from setemb.modules.image import PictureEncoder, RegionEncoder
from setemb.modules.open_clip import OpenClipTextEncoder
from setemb.modules.pie_net import PIENet
from setemb.modules.set_prediction import SetOutput, SetPrediction
from setemb.modules.slot_attention import SlotAttention
from setemb.modules.text import FeatureTextEncoder, GRUTextEncoder, TransformerTextEncoder

__all__ = [
    "FeatureTextEncoder",
    "GRUTextEncoder",
    "OpenClipTextEncoder",
    "PIENet",
    "PictureEncoder",
    "RegionEncoder",
    "SetOutput",
    "SetPrediction",
    "SlotAttention",
    "TransformerTextEncoder",
]
