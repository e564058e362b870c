from .contrastive import Contrastive
from .distillation import Distillation

__all__ = ["Contrastive", "Distillation"]
