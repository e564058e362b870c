"""The retrieval metric, in batches, under Lightning, over processes; and run dictionaries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics")

from setemb.evaluation import evaluate_retrieval
from setemb_kernels import set_rank, set_topk
from setemb_kernels.integrations.losses import SetInfoNCELoss
from setemb_kernels.integrations.metrics import SetRetrieval, run_dictionaries
from tests.integrations.same import flags, sets

X, Y = sets(20, 4, seed=1, dtype=torch.float32), sets(60, 4, seed=2, dtype=torch.float32)
X_GROUP, Y_GROUP = torch.arange(20), torch.arange(60) // 3


def test_the_numbers_of_evaluation() -> None:
    metric = SetRetrieval()
    for start in range(0, 20, 7):  # batches need not be equal
        metric.update(X[start : start + 7], Y[3 * start : 3 * start + 21],
                      X_GROUP[start : start + 7], Y_GROUP[3 * start : 3 * start + 21])  # fmt: skip
    found = {name: value.item() for name, value in metric.compute().items()}
    report = evaluate_retrieval(X, Y, image_groups=X_GROUP, caption_groups=Y_GROUP)
    for direction, recall in (("x_to_y", report.image_to_text), ("y_to_x", report.text_to_image)):
        for name in ("r1", "r5", "r10", "median_rank", "mean_rank"):
            assert found[f"{direction}_{name}"] == pytest.approx(getattr(recall, name), rel=1e-6), name
    assert found["rsum"] == pytest.approx(report.rsum, rel=1e-6)
    metric.reset()
    metric.update(X, X)
    assert metric.compute()["rsum"] == 600


def test_another_similarity() -> None:
    metric = SetRetrieval(ks=(1,), kind="maxsim", reduction="mean")
    metric.update(X, Y, X_GROUP, Y_GROUP)
    ranks = set_rank(X, Y, x_group=X_GROUP, y_group=Y_GROUP, kind="maxsim", reduction="mean")
    assert metric.compute()["x_to_y_mean_rank"] == 1 + ranks.x.float().mean()
    with pytest.raises(ValueError, match="kind: expected one of"):
        SetRetrieval(kind="nearest")  # type: ignore[arg-type]


def test_pairs_of_each_update() -> None:
    one, many = SetRetrieval(ks=(1, 3)), SetRetrieval(ks=(1, 3))
    one.update(X, Y[:20])
    for i in range(0, 20, 6):
        many.update(X[i : i + 6], Y[i : i + 6][: len(X[i : i + 6])])
    a, b = one.compute(), many.compute()
    assert set(a) == {f"{d}_{n}" for d in ("x_to_y", "y_to_x") for n in ("r1", "r3", "median_rank", "mean_rank")} | {
        "rsum"
    }
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_masks_and_sets_of_other_sizes() -> None:
    """Batches as a loader pads them, each to its own longest set."""
    x_mask, y_mask = flags(20, 4, seed=1), flags(60, 4, seed=2)
    truth = set_rank(X, Y, x_group=X_GROUP, y_group=Y_GROUP, x_mask=x_mask, y_mask=y_mask)
    metric = SetRetrieval(ks=(1,))
    for i, width in ((0, 4), (7, 6), (14, 5)):
        a, b = slice(i, i + 7 if i < 14 else 20), slice(3 * i, 3 * i + 21)
        padded = [torch.nn.functional.pad(v, (0, 0, 0, width - 4), value=torch.nan) for v in (X[a], Y[b])]
        masks = [torch.nn.functional.pad(m, (0, width - 4)) for m in (x_mask[a], y_mask[b])]
        metric.update(*padded, X_GROUP[a], Y_GROUP[b], *masks)
    found = metric.compute()
    assert found["x_to_y_mean_rank"] == 1 + truth.x.float().mean()
    assert found["y_to_x_mean_rank"] == 1 + truth.y.float().mean()

    unmasked, parts = SetRetrieval(ks=(1,)), SetRetrieval(ks=(1,))
    every = torch.arange(4) < torch.where(torch.arange(20) < 10, 3, 4)[:, None]
    unmasked.update(X, Y[:20], x_mask=every)
    parts.update(X[:10, :3], Y[:10])
    parts.update(X[10:], Y[10:20])
    assert unmasked.compute() == parts.compute()


def test_nothing_to_rank() -> None:
    metric = SetRetrieval()
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="was called before"),  # torchmetrics itself
            pytest.raises(ValueError, match=r"compute: expected sets .*got 0 of x and 0 of y"),
        ):
            metric.compute()
        metric.update(X, Y, X_GROUP, Y_GROUP)
        metric.reset()
    metric.update(X, Y[:0], X_GROUP, Y_GROUP[:0])
    with pytest.raises(ValueError, match=r"compute: expected sets .*got 20 of x and 0 of y"):
        metric.compute()


def test_ids_in_some_updates_only() -> None:
    metric = SetRetrieval()
    metric.update(X, Y, X_GROUP, Y_GROUP)
    with pytest.raises(ValueError, match="x_group: expected ids as in updates before, got None"):
        metric.update(X, X)
    metric.reset()
    metric.update(X, X)
    with pytest.raises(ValueError, match="x_group: expected None as in updates before, got ids"):
        metric.update(X, Y, X_GROUP, Y_GROUP)
    metric(X, Y, X_GROUP, Y_GROUP)  # for which it starts anew, and adds it up afterwards
    with pytest.raises(ValueError, match="x_group: expected ids in all updates or in none, got them in 1 of 2 updates"):
        metric.compute()


WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "ids of one side": (ValueError, "y_group: expected ids as for the other side", {"y_group": None}),
    "ids of others": (
        ValueError,
        r"y_group: expected shape \[60\] as of y, got \[20\]",
        {"y_group": X_GROUP},
    ),
    "a mask of others": (
        ValueError,
        r"x_mask: expected shape \[20, 4\] as of x, got \[60, 4\]",
        {"x_mask": flags(60, 4)},
    ),
    "a mask of numbers": (TypeError, "y_mask: expected bool", {"y_mask": flags(60, 4).float()}),
    "vectors": (ValueError, "x: expected 3 dimensions", {"x": X[0]}),
    "other features": (ValueError, "y: expected 16 features as in x, got 8", {"y": Y[..., :8]}),
    "features unlike before": (
        ValueError,
        "x: expected 16 features as in updates before, got 8",
        {"x": X[..., :8], "y": Y[..., :8]},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_updates_name_what_is_wrong(name: str) -> None:
    error, message, change = WRONG[name]
    good = {"x": X, "y": Y, "x_group": X_GROUP, "y_group": Y_GROUP}
    metric = SetRetrieval()
    metric.update(**good)
    with pytest.raises(error, match=message):
        metric.update(**(good | change))


def test_wrong_input_is_said() -> None:
    for ks in ((), (0,), (1.5,), (True,)):
        with pytest.raises(ValueError, match="ks: expected ints of at least 1"):
            SetRetrieval(ks=ks)
    with pytest.raises(ValueError, match="y: expected 20 sets as in x where there are no ids, got 60"):
        SetRetrieval().update(X, Y)


def test_under_lightning(tmp_path: Any) -> None:
    lightning: Any = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(16, 16)
            self.loss, self.retrieval = SetInfoNCELoss(learnable=True), SetRetrieval(ks=(1,))

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            x, y = (torch.nn.functional.normalize(self.project(side), dim=-1) for side in batch)
            return self.loss(x, y)

        def validation_step(self, batch: list[torch.Tensor]) -> None:
            self.retrieval.update(*batch)

        def on_validation_epoch_end(self) -> None:
            self.log_dict(self.retrieval.compute())
            self.retrieval.reset()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(X, Y[:20])
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    module = Module()
    start = module.loss.log_temperature.item()
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["x_to_y_r1"] >= 0 and module.loss.log_temperature.item() != start


def _process(rank: int, ranks: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    metric = SetRetrieval()
    x, y = X[rank::ranks], Y[:20][rank::ranks]
    x_mask = torch.ones(10, 4 + rank).bool()  # of other widths
    x_mask[:, 4:] = False
    metric.update(torch.nn.functional.pad(x, (0, 0, 0, rank)), y, x_mask=x_mask)  # ids of its own in each process
    found = {name: value.item() for name, value in metric.compute().items()}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_over_processes(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_process, (2, str(tmp_path)), nprocs=2)
    whole = SetRetrieval()
    whole.update(X, Y[:20])
    truth = {name: value.item() for name, value in whole.compute().items()}
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(truth)


def test_run_dictionaries() -> None:
    names = [f"image {i}" for i in range(20)], [f"text {i}" for i in range(60)]
    run, relevant = run_dictionaries(
        X, Y, query_ids=names[0], gallery_ids=names[1], query_group=X_GROUP + 1, gallery_group=Y_GROUP, k=7
    )
    found = set_topk(X, Y, 7)
    assert list(run) == names[0]
    assert list(run["image 3"]) == [f"text {i}" for i in found.indices[3].tolist()]
    assert list(run["image 3"].values()) == found.values[3].tolist()
    assert relevant["image 3"] == {"text 12": 1, "text 13": 1, "text 14": 1} and "image 19" not in relevant
    run, relevant = run_dictionaries(X, Y[:5])
    assert list(run) == list(map(str, range(20))) and len(run["0"]) == 5 and relevant == {}
    with pytest.raises(ValueError, match="gallery_ids: expected 60 different names, got 60, 1 different"):
        run_dictionaries(X, Y, gallery_ids=["a"] * 60)
    for change, message in (
        ({"gallery_group": None}, "gallery_group: expected ids"),
        ({"query_group": X_GROUP[:7]}, r"query_group: expected shape \[20\] as of queries, got \[7\]"),
        ({"gallery_group": X_GROUP}, r"gallery_group: expected shape \[60\] as of gallery, got \[20\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run_dictionaries(X, Y, **({"query_group": X_GROUP, "gallery_group": Y_GROUP} | change))
    with pytest.raises(TypeError, match=r"query_group: expected a torch.Tensor of integers or None, got list"):
        run_dictionaries(X, Y, query_group=[0] * 20, gallery_group=Y_GROUP)  # type: ignore[arg-type]


def test_ranx_reads_them() -> None:
    ranx: Any = pytest.importorskip("ranx")
    run, relevant = run_dictionaries(X, Y, query_group=X_GROUP, gallery_group=Y_GROUP, k=60)
    scores = ranx.evaluate(ranx.Qrels(relevant), ranx.Run(run), ["hit_rate@5"])
    metric = SetRetrieval()
    metric.update(X, Y, X_GROUP, Y_GROUP)
    assert np.isclose(100 * scores, metric.compute()["x_to_y_r5"].item())
