import torch


def maxsim_inbatch(query: torch.Tensor, doc: torch.Tensor) -> torch.Tensor:
    return (query[:, None] @ doc.mT).amax(-1).sum(-1)


def maxsim_kd(query: torch.Tensor, doc: torch.Tensor) -> torch.Tensor:
    return (query[:, None] @ doc.mT).amax(-1).sum(-1)
