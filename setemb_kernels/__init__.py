"""Fused kernels for sets of embeddings: C++ (CPU, CUDA), Triton, and a reference in plain torch behind the same ops."""

from setemb_kernels._version import __version__
from setemb_kernels.backends import Backend, backends, build_info, load_cpu_module, use_backend
from setemb_kernels.losses import set_infonce_loss, set_sigmoid_loss, set_triplet_loss
from setemb_kernels.ops.set_similarity.op import chamfer, match_probability, maxsim, set_similarity, soft_maxsim
from setemb_kernels.ops.set_similarity.precompile import precompile_set_similarity
from setemb_kernels.ops.slot_attention.op import slot_attention
from setemb_kernels.ops.smooth_chamfer.op import smooth_chamfer
from setemb_kernels.retrieval import Ranks, TopK, set_rank, set_topk

load_cpu_module()

__all__ = [
    "Backend",
    "Ranks",
    "TopK",
    "__version__",
    "backends",
    "build_info",
    "chamfer",
    "match_probability",
    "maxsim",
    "precompile_set_similarity",
    "set_infonce_loss",
    "set_rank",
    "set_sigmoid_loss",
    "set_similarity",
    "set_topk",
    "set_triplet_loss",
    "slot_attention",
    "smooth_chamfer",
    "soft_maxsim",
    "use_backend",
]
