"""What the drop-ins of `setemb_kernels.integrations` are measured on: workloads as a package's users have them, of 128
features.

python -m benchmarks.integrations NAME own|ours   # MiB at the peak of one call, beyond its inputs and results
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import peak_beyond_inputs_and_results
from benchmarks.peers import eager_similarity
from setemb_kernels import integrations
from setemb_kernels.integrations import dive

Step = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One workload. ``make(scale)`` gives the step, of 1/scale of the items."""

    distribution: str
    package: str
    make: Callable[[int], Step]
    patch: Callable[[], AbstractContextManager[Any]] | None = None
    """Within it the same step is ours; else `ours` is another one."""
    ours: Callable[[int], Step] | None = None

    @property
    def beside(self) -> str:
        return f"{self.distribution} {version(self.distribution)}"

    def absent(self) -> str:
        """Why it cannot be measured; empty when it can."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.distribution} is not installed"
        try:
            self.make(16)()
        except ImportError as error:
            return f"{self.distribution} cannot be imported: {error}"
        return ""

    def around(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.patch is None else self.patch()


def units(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def tokens(items: int, longest: int, shortest: int) -> Tensor:
    """A mask ``[items, longest]`` of tokens from the first on, of lengths spread evenly."""
    return torch.arange(longest) < torch.linspace(shortest, longest, items).round()[:, None]


def step(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """Result and gradients."""
    leaves = [i.requires_grad_() for i in inputs]

    def run() -> Sequence[Tensor]:
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def _pylate_contrastive(scale: int) -> Step:
    metric = importlib.import_module("pylate.scores").ColBERTScores()
    n = 64 // scale
    mask = tokens(2 * n, 180, 60).view(n, 2, 180)
    return step(lambda q, d: metric(q, d, documents_mask=mask), units(n, 32, 128), units(n, 2, 180, 128))


def _pylate_in_batch(scale: int) -> Step:
    """As its `Contrastive` loss scores a batch: every query with every document."""
    scores = importlib.import_module("pylate.scores")
    n = 256 // scale

    def loss(q: Tensor, d: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(scores.colbert_scores(q, d), torch.arange(n))

    return step(loss, units(n, 32, 128), units(n, 180, 128))


def _pylate_distillation(scale: int) -> Step:
    scores = importlib.import_module("pylate.scores")
    n = 16 // scale
    mask = tokens(16 * n, 180, 60).view(n, 16, 180)
    return step(
        lambda q, d: scores.colbert_kd_scores(q, d, documents_mask=mask), units(n, 32, 128), units(n, 16, 180, 128)
    )


def _sentence_transformers(scale: int) -> Step:
    scoring = importlib.import_module("sentence_transformers.multi_vector_encoder.scoring")
    n = 64 // scale
    mask = tokens(2 * n, 180, 60).view(n, 2, 180)
    return step(
        lambda q, d: scoring.colbert_scores(q, d, documents_mask=mask), units(n, 32, 128), units(n, 2, 180, 128)
    )


def _sentence_transformers_search(scale: int) -> Step:
    util = importlib.import_module("sentence_transformers.util")
    queries = list(units(16, 32, 128))
    documents = [units(n, 128) for n in tokens(1024 // scale, 180, 60).sum(1).tolist()]
    return lambda: [util.maxsim(queries, documents)]


def _colpali_loss(scale: int, *, smooth: bool) -> Step:
    import_without_models("colpali_engine")
    losses = importlib.import_module("colpali_engine.loss.late_interaction_losses")
    n = 32 // scale
    loss = losses.ColbertLoss(use_smooth_max=smooth, normalize_scores=False)  # which says when a score is above 1
    return step(loss, units(n, 32, 128) * tokens(n, 32, 12)[..., None], units(n, 1030, 128))


def _colpali_scoring(scale: int) -> Step:
    import_without_models("colpali_engine")
    processing = importlib.import_module("colpali_engine.utils.processing_utils")
    queries = [units(n, 128) for n in tokens(16, 32, 12).sum(1).tolist()]
    pages = [units(n, 128) for n in tokens(256 // scale, 768, 256).sum(1).tolist()]
    score = processing.BaseVisualRetrieverProcessor
    return lambda: [score.score_multi_vector(queries, pages, device="cpu")]


def _slot_attention(scale: int) -> Step:
    package = importlib.import_module("slot_attention")
    torch.manual_seed(0)
    module = package.MultiHeadSlotAttention(8, 128, heads=4, dim_head=32, iters=3)
    tokens = torch.randn(16 // scale, 1024, 128, requires_grad=True)
    leaves = [tokens, *module.parameters()]

    def run() -> Sequence[Tensor]:
        out = module(tokens)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def _late_interaction_kernels(scale: int, package: str = "late_interaction_kernels") -> Step:
    scorer = importlib.import_module(package).MaxSimScorer()
    n = 64 // scale
    mask = tokens(2 * n, 180, 60)
    return step(lambda q, d: scorer(q, d, d_mask=mask), units(n, 32, 128), units(2 * n, 180, 128))


def _flash_maxsim(scale: int, function: str = "flash_maxsim.maxsim_naive_batched") -> Step:
    """The package's own kernels need a GPU; this is its plain function."""
    module, name = function.rsplit(".", 1)
    scorer = getattr(importlib.import_module(module), name)
    n = 64 // scale
    return step(scorer, units(n, 32, 128), units(2 * n, 180, 128))


def _metric_learning(scale: int, *, ours: bool = False) -> Step:
    """Vectors of two modalities; here sets of one vector, of unit length, as the package compares cosines."""
    losses = importlib.import_module("pytorch_metric_learning.losses")
    n = 256 // scale
    labels, others = torch.arange(n), torch.arange(n)  # one tensor for both would mean one batch with itself
    own, set_loss = (
        losses.NTXentLoss(),
        integrations.MetricLearningLoss(integrations.SetInfoNCELoss(0.07, symmetric=False)),
    )

    def run(x: Tensor, y: Tensor) -> Tensor:
        if ours:
            x, y = (torch.nn.functional.normalize(v, dim=-1)[:, None] for v in (x, y))
        loss: Tensor = (set_loss if ours else own)(x, labels, ref_emb=y, ref_labels=others)
        return loss

    return step(run, torch.randn(n, 128), torch.randn(n, 128))


def _dive(scale: int, *, ours: bool = False) -> Step:
    """Sets one after the other in a matrix, as its code has them; what it does, written plainly."""
    n = 128 // scale
    module = dive.SetwiseSimilarity(4, 4, 2, 16)

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return eager_similarity(x.view(-1, 4, 1024), y.view(-1, 4, 1024))

    return step(module.smooth_chamfer_similarity if ours else plain, units(4 * n, 1024), units(20 * n, 1024))


CASES = {
    "PyLate, contrastive: 64 queries of 32, 128 documents of 60 to 180, forward + backward": Case(
        "pylate", "pylate", _pylate_contrastive, integrations.patch_pylate
    ),
    "PyLate, InfoNCE in a batch: 256 queries of 32, 256 documents of 180, forward + backward": Case(
        "pylate", "pylate", _pylate_in_batch, integrations.patch_pylate
    ),
    "PyLate, distillation: 16 queries of 32, each 16 documents of 60 to 180, forward + backward": Case(
        "pylate", "pylate", _pylate_distillation, integrations.patch_pylate
    ),
    "sentence-transformers, contrastive: 64 queries of 32, 128 documents of 60 to 180, forward + backward": Case(
        "sentence-transformers",
        "sentence_transformers",
        _sentence_transformers,
        integrations.patch_sentence_transformers,
    ),
    "sentence-transformers, maxsim of lists: 16 queries of 32, 1,024 documents of 60 to 180": Case(
        "sentence-transformers",
        "sentence_transformers",
        _sentence_transformers_search,
        integrations.patch_sentence_transformers,
    ),
    "colpali-engine, ColbertLoss: 32 queries of 12 to 32, 32 pages of 1,030, forward + backward": Case(
        "colpali-engine",
        "colpali_engine",
        lambda scale: _colpali_loss(scale, smooth=False),
        integrations.patch_colpali_engine,
    ),
    "colpali-engine, ColbertLoss with smooth maximum: the same, forward + backward": Case(
        "colpali-engine",
        "colpali_engine",
        lambda scale: _colpali_loss(scale, smooth=True),
        integrations.patch_colpali_engine,
    ),
    "colpali-engine, score_multi_vector: 16 queries of 12 to 32, 256 pages of 256 to 768": Case(
        "colpali-engine", "colpali_engine", _colpali_scoring, integrations.patch_colpali_engine
    ),
    "slot-attention, MultiHeadSlotAttention: B16 T1024 D128 4x32 K8 x3, forward + backward": Case(
        "slot-attention", "slot_attention", _slot_attention, integrations.patch_slot_attention
    ),
    "late-interaction-kernels, scorer: 64 queries of 32, 128 documents of 60 to 180, forward + backward": Case(
        "late-interaction-kernels",
        "late_interaction_kernels",
        _late_interaction_kernels,
        ours=lambda scale: _late_interaction_kernels(scale, "setemb_kernels.integrations.late_interaction_kernels"),
    ),
    "flash-maxsim, its plain function: 64 queries of 32, 128 documents of 180, forward + backward": Case(
        "flash-maxsim",
        "flash_maxsim",
        _flash_maxsim,
        ours=lambda scale: _flash_maxsim(scale, "setemb_kernels.integrations.flash_maxsim.flash_maxsim_batched"),
    ),
    "pytorch-metric-learning, NTXentLoss: 256 vectors and 256 of another modality, forward + backward": Case(
        "pytorch-metric-learning",
        "pytorch_metric_learning",
        _metric_learning,
        ours=lambda scale: _metric_learning(scale, ours=True),
    ),
    "DivE's smooth-Chamfer, written plainly: 128 images, 640 captions, K4 D1024, forward + backward": Case(
        "torch", "torch", _dive, ours=lambda scale: _dive(scale, ours=True)
    ),
}


def peak(name: str, which: str) -> float:
    """MiB; in a process of its own."""
    case = CASES[name]
    make = case.ours if which == "ours" and case.ours else case.make
    case.make(16)()  # the package is there before it is patched
    with case.around() if which == "ours" else nullcontext():
        make(16)()  # threads, libraries
        return peak_beyond_inputs_and_results(make(1))


def import_without_models(name: str) -> None:
    """colpali-engine imports all its models, and so torchvision; where that is absent, its losses and its scoring are
    imported without them."""
    try:
        importlib.import_module(name)
    except ImportError:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]
        package = types.ModuleType(name)
        package.__path__, package.__spec__ = list(spec.submodule_search_locations or []), spec
        sys.modules[name] = package


if __name__ == "__main__":
    print(peak(*sys.argv[1:]))
