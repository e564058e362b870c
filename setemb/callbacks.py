"""What happens around the steps of training: checkpoints, and stopping or saying so where it goes wrong."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_warn

from setemb.checkpoint import load_checkpoint, save_checkpoint
from setemb.config import LossConfig


class SafetensorsIO(CheckpointIO):
    """Lightning's checkpoints as `setemb.checkpoint` writes them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class BestCheckpoint(ModelCheckpoint):
    """``best.safetensors``: the epoch with the highest dev RSUM."""

    FILE_EXTENSION = ".safetensors"

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder, "best", monitor="dev/rsum", mode="max", enable_version_counter=False, save_on_train_epoch_end=False
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a run whose folder was moved or copied, Lightning would forget the best so far."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        kept = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": kept, "dirpath": self.dirpath})


class LastCheckpoint(Callback):
    """``last.safetensors``: every ``every`` steps and at the end of each epoch, after its evaluation."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not changed_weights(trainer, batch_idx):
            return
        if self.every > 0 and trainer.global_step % self.every == 0 and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class ProgressBar(TQDMProgressBar):
    """Lightning's, without the logger's version."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {key: value for key, value in super().get_metrics(trainer, pl_module).items() if key != "v_num"}


class StopAtNonFinite(Callback):
    """Ends training where a loss or a gradient is not finite, before the weights take it in.

    With float16 gradients may overflow: the scaler leaves such a step out, and looks for a smaller scale. Training ends
    where that falls below `SMALLEST_SCALE`.

    Raises:
        FloatingPointError: naming the step, the batch and the last checkpoint.
    """

    SMALLEST_SCALE = 2.0**-14
    """Of float16's scaler, which starts at 2^16: gradients that overflow at this scale are of weights that are lost."""

    def __init__(self, last: Path) -> None:
        self.last = last

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        values = [value.float() for value in pl_module.losses.values()]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if scaler is None and gradients:
            values.append(torch.stack(torch._foreach_norm(gradients)).sum().float())
        numbers = torch.stack(values).tolist()  # one wait for the device
        pl_module.seen = dict(zip(pl_module.losses, numbers, strict=False))
        if not all(map(_finite, pl_module.seen.values())):
            self._stop(trainer, pl_module, f"the loss is {pl_module.seen['loss']}")
        if not all(map(_finite, numbers)):
            self._stop(trainer, pl_module, "a gradient is not finite")
        if scaler is not None and scaler.get_scale() < self.SMALLEST_SCALE:
            self._stop(trainer, pl_module, f"gradients overflow float16 even at a scale of {scaler.get_scale()}")

    def _stop(self, trainer: pl.Trainer, pl_module: Any, what: str) -> None:
        epoch, number = divmod(pl_module.global_step, pl_module.steps_per_epoch)
        parts = ", ".join(f"{name} {value:.4g}" for name, value in pl_module.seen.items() if name != "loss")
        batch, rows = pl_module.batch, pl_module.batch["image_group"].tolist()
        batches = trainer.accumulate_grad_batches
        whose = "its images" if batches == 1 else f"the images of the last of its {batches} batches"
        said = f"{whose} are rows {_some(rows)} of the training split"
        if batch["images"].is_floating_point():
            bad = ~batch["images"].flatten(1).isfinite().all(1)
            if bad.any():
                bad_rows = batch["image_group"][bad].tolist()
                said = f"rows {_some(bad_rows)} of the training split hold features that are not finite"
        kept = "there is no checkpoint yet"
        if self.last.is_file():
            kept = f"the last checkpoint, of step {load_checkpoint(self.last)['global_step']}, is {self.last}"
        raise FloatingPointError(
            f"training stopped at step {pl_module.global_step} (epoch {epoch}, batch {number}): {what} ({parts}); "
            f"{said}; {kept}"
        )


class WarnOfCollapse(Callback):
    """Says once where the triplet loss has collapsed: all similarities are alike, so it stays at twice the margin.

    That is so where over `WINDOW` steps the main loss is within `NEAR` of it on average and does not fall by more than
    `FALL` of it from the first half to the second, and the similarities between some images and captions of a batch
    have a standard deviation below `SPREAD` of the margin. (A loss that stays there is not enough: it does, too, where
    many images are alike.)
    """

    WINDOW, NEAR, FALL, SPREAD = 100, 0.1, 0.01, 0.1

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.said = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not changed_weights(trainer, batch_idx):
            return
        self.losses.append(pl_module.seen["main"])
        if self.said or not self.stuck():
            return
        spread = float(pl_module.model.similarity(*pl_module.sample).std())
        if not spread < self.SPREAD * self.config.margin:
            return
        self.said = True
        level = sum(self.losses) / len(self.losses)
        rank_zero_warn(
            f"the training has collapsed: for {self.WINDOW} steps, to step {pl_module.global_step}, the loss stayed at "
            f"{level:.3f}, twice the margin, and similarities differ by {spread:.1g} alone. A longer warm-up "
            f"(loss.warmup_epochs, now {self.config.warmup_epochs:g}), a smaller optimizer.lr or loss.hardest_fraction "
            "or loss.kind=info_nce avoid it"
        )

    def stuck(self) -> bool:
        """Whether the loss has stayed at twice the margin."""
        losses, level, half = list(self.losses), 2 * self.config.margin, self.WINDOW // 2
        if len(losses) < self.WINDOW:
            return False
        first, second = sum(losses[:half]) / half, sum(losses[half:]) / (len(losses) - half)
        return abs((first + second) / 2 - level) <= self.NEAR * level and first - second <= self.FALL * level


def changed_weights(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a batch was the last of its step; an epoch holds whole steps."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _some(rows: list[int], limit: int = 8) -> str:
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return ", ".join(map(str, rows[:limit])) + more
