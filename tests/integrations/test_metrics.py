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
from tests.integrations.same import sets

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


def test_wrong_input_is_said() -> None:
    for ks in ((), (0,), (1.5,), (True,)):
        with pytest.raises(ValueError, match="ks: expected ints of at least 1"):
            SetRetrieval(ks=ks)
    with pytest.raises(ValueError, match="y_group: expected ids as for the other side"):
        SetRetrieval().update(X, Y, X_GROUP)
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
    metric.update(X[rank::ranks], Y[:20][rank::ranks])  # ids of its own in each process
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
    with pytest.raises(ValueError, match="gallery_group: expected ids"):
        run_dictionaries(X, Y, query_group=X_GROUP)


def test_ranx_reads_them() -> None:
    ranx: Any = pytest.importorskip("ranx")
    run, relevant = run_dictionaries(X, Y, query_group=X_GROUP, gallery_group=Y_GROUP, k=60)
    scores = ranx.evaluate(ranx.Qrels(relevant), ranx.Run(run), ["hit_rate@5"])
    metric = SetRetrieval()
    metric.update(X, Y, X_GROUP, Y_GROUP)
    assert np.isclose(100 * scores, metric.compute()["x_to_y_r5"].item())
