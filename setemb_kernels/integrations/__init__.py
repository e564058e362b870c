"""Drop-ins for those who already use another package: one line changes, and one line changes it back.

    from setemb_kernels.integrations import patch_pylate

    print(patch_pylate())      # lasts until its undo(); says what was replaced
    with patch_pylate():       # or for a block
        ...

``patch_pylate``, ``patch_sentence_transformers``, ``patch_colpali_engine`` and ``patch_slot_attention`` replace what
those packages compute by the ops of `setemb_kernels`; none of them is imported before it is patched. Beside them stand
modules with the names of others: `late_interaction_kernels`, `flash_maxsim` and `dive`; `losses` and `metrics` are for
training loops. docs/integrations.md has the table.
"""

from setemb_kernels.integrations._patch import Patch
from setemb_kernels.integrations.colpali_engine import patch_colpali_engine
from setemb_kernels.integrations.losses import MetricLearningLoss, SetInfoNCELoss, SetSigmoidLoss, SetTripletLoss
from setemb_kernels.integrations.pylate import patch_pylate
from setemb_kernels.integrations.sentence_transformers import patch_sentence_transformers
from setemb_kernels.integrations.slot_attention import patch_slot_attention

__all__ = [
    "MetricLearningLoss",
    "Patch",
    "SetInfoNCELoss",
    "SetSigmoidLoss",
    "SetTripletLoss",
    "patch_colpali_engine",
    "patch_pylate",
    "patch_sentence_transformers",
    "patch_slot_attention",
]
