"""ECCV Caption, CxC and PMRP: what the package ``eccv_caption`` counts in the test split of COCO, with more positive
pairs than an image and its five captions (Chun et al., ECCV 2022; Parekh et al., EACL 2021; Chun et al., CVPR 2021)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setemb.ensemble import Encoded, Similarities, SimilarityFunction
from setemb.packages import require
from setemb.similarity import Similarity
from setemb_kernels.retrieval import Tiles, topk_of_tiles

AT = (1, 5, 10)
_WAYS = {"i2t": "image_to_text", "t2i": "text_to_image"}


@torch.inference_mode()
def evaluate_eccv_caption(
    image_sets: Tensor | np.ndarray,
    caption_sets: Tensor | np.ndarray,
    *,
    image_ids: Sequence[int] | None = None,
    caption_ids: Sequence[int] | None = None,
    pmrp_files: str | Path | None = None,
    similarity: Similarity | SimilarityFunction = "smooth_chamfer",
    alpha: float = 16.0,
) -> dict[str, dict[str, float]]:
    """Figures of ECCV Caption and CxC both ways, in percent, from the best items alone: no full ranking is made.

    COCO's own 5K and 1K recall are in `setemb.evaluation.evaluate_retrieval`.

    Args:
        image_sets, caption_sets: ``[N, K, D]`` and ``[M, L, D]``, also memory-mapped. All images and captions that the
            package knows must be among them: 5,000 and 25,000.
        image_ids, caption_ids: COCO's numbers of them. By default those of the test split in its usual order, which
            the package holds: the one of ``testall_caps.txt``.
        pmrp_files: the folder with ``pm_image_to_caption.json`` and ``pm_caption_to_image.json``, which are not part
            of the package; without them there is no PMRP.
        similarity: see `setemb.similarity.set_similarity`, or a function of two batches of sets.
        alpha: sharpness of smooth_chamfer.

    Returns:
        For each of ``eccv_map_at_r``, ``eccv_rprecision``, ``eccv_r1``, ``cxc_r1``, ``cxc_r5``, ``cxc_r10`` and, with
        the files, ``pmrp``: ``{"image_to_text": ..., "text_to_image": ...}``.

    Raises:
        ImportError: the package is missing.
        FileNotFoundError: one of the files of PMRP is.
        ValueError: naming the argument, what came and what was expected.
    """
    of = Similarities([Encoded(image_sets, caption_sets, similarity, alpha)])
    return eccv_caption_of(of, image_ids=image_ids, caption_ids=caption_ids, pmrp_files=pmrp_files)


@torch.inference_mode()
def eccv_caption_of(
    similarities: Similarities,
    *,
    image_ids: Sequence[int] | None = None,
    caption_ids: Sequence[int] | None = None,
    pmrp_files: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """`evaluate_eccv_caption` of one model or of an ensemble: ``Similarities([Encoded(...), Encoded(...)])``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "failed to import", UserWarning)  # of faster packages that it can do without
        counting = require("eccv_caption", "coco").Metrics(None)
    if pmrp_files is not None:
        files = [Path(pmrp_files) / f"pm_{way}.json" for way in ("image_to_caption", "caption_to_image")]
        for path in files:
            if not path.is_file():
                raise FileNotFoundError(f"pmrp_files: {path} is missing")
        counting.set_pm_gts(*map(str, files))
    usual = [int(id_) for id_ in counting.coco_ids]
    ids = {
        "image_ids": [counting.coco_gts["t2i"][id_][0] for id_ in usual[::5]] if image_ids is None else image_ids,
        "caption_ids": usual if caption_ids is None else caption_ids,
    }
    N, M = similarities.shape
    truths = [counting.coco_gts, counting.cxc_gts, counting.eccv_gts, *([counting.pm_gts] if pmrp_files else [])]
    for name, count, way in (("image_ids", N, "i2t"), ("caption_ids", M, "t2i")):
        if len(ids[name]) != count:
            raise ValueError(f"{name}: expected one for each of {count} sets, got {len(ids[name])}")
        if len(set(ids[name])) != count:
            raise ValueError(f"{name}: expected {count} that differ, got {len(set(ids[name]))}")
        missing = {query for truth in truths for query in truth[way]} - set(ids[name])
        if missing:
            raise ValueError(
                f"{name}: expected all of the test split, {len(missing)} are missing (one is {min(missing)})"
            )
    best = {
        "i2t": _best(similarities, ids["image_ids"], ids["caption_ids"], _longest(truths, "i2t")),
        "t2i": _best(similarities.T, ids["caption_ids"], ids["image_ids"], _longest(truths, "t2i")),
    }
    with redirect_stderr(io.StringIO()):  # progress bars that cannot be turned off
        figures: dict[str, Any] = counting.eccv_metrics(best, "all")
        figures |= {f"cxc_r{k}": counting.cxc_recalls(best, "all", K=k) for k in AT}
        if pmrp_files is not None:
            figures["pmrp"] = counting.pmrp(best, "all")
    return {name: {_WAYS[way]: 100 * float(value) for way, value in of.items()} for name, of in figures.items()}


def _longest(truths: Sequence[Any], way: str) -> int:
    """How many of the best are looked at: as many as a query has positives."""
    return max(max(AT), *(len(positives) for truth in truths for positives in truth[way].values()))


def _best(similarities: Tiles, query_ids: Sequence[int], item_ids: Sequence[int], k: int) -> dict[int, list[int]]:
    found = topk_of_tiles(similarities, min(k, similarities.shape[1])).indices
    return dict(zip(map(int, query_ids), np.asarray(item_ids)[found.cpu().numpy()].tolist(), strict=True))
