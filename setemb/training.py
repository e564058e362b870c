"""Training with Lightning: the module, the trainer, and runs that resume exactly where they were killed.

A run is a folder::

    config.yaml             what was asked for, sizes filled in
    last.safetensors        the newest checkpoint: weights, optimizer, schedule, loop counters
    best.safetensors        that with the highest dev RSUM
    model/                  the best model as `SetEmbedder.save_pretrained` writes it, at the end
    metrics/from_step_N/    metrics.csv of the part of the run that started at step N; `read_metrics` joins them
    tensorboard/

Exact resumption needs no saved random state: before every step the generators are seeded from the seed, the number of
the step and the process, and the data is a function of the same numbers (`setemb.data.loader`).
"""

from __future__ import annotations

import csv
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

try:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.plugins import MixedPrecision, Precision
except ImportError as error:
    raise ImportError('training needs lightning 2.6 or newer: pip install "setemb[train]"') from error

from setemb.accumulate import encode_in_parts
from setemb.callbacks import (
    BestCheckpoint,
    LastCheckpoint,
    ProgressBar,
    SafetensorsIO,
    StopAtNonFinite,
    WarnOfCollapse,
)
from setemb.checkpoint import load_checkpoint, remove_leftovers, write_file
from setemb.compilation import compiled
from setemb.config import (
    Config,
    DataConfig,
    ImageConfig,
    OptimizerConfig,
    TrainerConfig,
    from_dict,
    load_config,
    to_yaml,
)
from setemb.data.captioned import CaptionedImages
from setemb.data.captions import Captions, FeatureCaptions, TokenCaptions, WordCaptions
from setemb.data.folder import open_split
from setemb.data.loader import RetrievalData, RetrievalDataModule, evaluation_loader
from setemb.data.precomp import PrecompDataset
from setemb.data.vectors import read_vectors
from setemb.data.vocab import Vocabulary
from setemb.ensemble import Encoded, Similarities
from setemb.evaluation import RecallReport, evaluate_similarities
from setemb.model import Batch, SetEmbedder
from setemb.modules import GRUTextEncoder, OpenClipTextEncoder, TransformerTextEncoder
from setemb.objective import training_loss
from setemb.processes import first, gathered_by_first, launched, place
from setemb.similarity import set_similarity

# Its remarks on devices and services are of no use here; its warnings stay.
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)


class RetrievalModule(pl.LightningModule):
    """The training step, the dev evaluation and the optimizer of a `SetEmbedder`."""

    def __init__(self, config: Config, model: SetEmbedder, steps_per_epoch: int) -> None:
        super().__init__()
        self.config, self.model, self.steps_per_epoch = config, model, steps_per_epoch
        # Of training alone: evaluation calls the model itself.
        self._encode_image, self._encode_text = model.encode_image, model.encode_text
        if config.trainer.compile:
            self._encode_image, self._encode_text = compiled(model.encode_image), compiled(model.encode_text)
        self._dev: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.batch: Batch | None = None
        """Of the step under way."""
        self.losses: dict[str, Tensor] = {}
        """Of the step under way, "loss" and its parts."""
        self.seen: dict[str, float] = {}
        """The same as numbers, as `setemb.callbacks` has seen them."""
        self.sample: tuple[Tensor, Tensor] | None = None
        """Sets of some images and captions of the step under way."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        parts = self.config.trainer.accumulate_batches
        batch_number = self.global_step * parts + batch_idx % parts
        torch.manual_seed(step_seed(self.config.trainer.seed, place()[0], batch_number))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        model, size = self.model, self.config.trainer.accumulate_embeddings
        images = encode_in_parts(self._encode_image, batch, ("images", "image_mask"), size, model)
        texts = encode_in_parts(self._encode_text, batch, ("texts", "text_mask"), size, model)
        epochs = self.global_step / self.steps_per_epoch
        loss, parts = training_loss(model, images, texts, batch, self.config.loss, epochs)
        self.batch, self.losses = batch, {name: v.detach() for name, v in {"loss": loss, **parts}.items()}
        self.sample = images.embeddings[:32].detach().clone(), texts.embeddings[:160].detach().clone()
        self.log("loss", self.losses["loss"], prog_bar=True)
        self.log_dict({f"loss/{name}": self.losses[name] for name in parts})
        # Each process has its part of one gradient: they are to be added, and are averaged.
        return loss * self.trainer.world_size

    def on_train_batch_end(self, *_: Any) -> None:
        self.batch = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, texts = self.model.encode_image(batch), self.model.encode_text(batch)
        self._dev.append((images.embeddings, texts.embeddings, batch["image_group"], batch["caption_group"]))

    def on_validation_epoch_end(self) -> None:
        several = self.trainer.world_size > 1

        def evaluate(shares: list[list[tuple[Tensor, ...]]]) -> RecallReport:
            parts = [tuple(t.to(self.device) for t in part) for share in shares for part in share]
            return evaluate_sets(self.model, cast(Any, parts))

        own = [tuple(t.cpu() for t in part) for part in self._dev] if several else self._dev
        report = gathered_by_first(own, cast(Any, evaluate))
        self._dev.clear()
        self.log("dev/rsum", report.rsum, prog_bar=True, sync_dist=several)  # the same in all
        for way in ("image_to_text", "text_to_image"):
            for name, value in asdict(getattr(report, way)).items():
                self.log(f"dev/{way}/{name}", value, sync_dist=several)

    def configure_optimizers(self) -> Any:
        config = self.config.optimizer
        optimizer = adamw(self.model, config, fused=self.config.trainer.precision != "16-mixed")
        # Not trainer.estimated_stepping_batches, which starts the data loader before the step to resume at is known.
        total = self.config.trainer.epochs * self.steps_per_epoch
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine_with_warmup(step, total, config.warmup_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        vocabulary = self.model.vocabulary
        checkpoint["setemb"] = {
            "config": asdict(self.config),
            "vocabulary": None if vocabulary is None else vocabulary.to_text(),
        }


def adamw(model: SetEmbedder, config: OptimizerConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, all of its arithmetic in one pass over the parameters where ``fused``.

    Not with float16: there a fused one unscales gradients by itself, too late to clip them.
    """
    groups = parameter_groups(model, config)
    known = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused and known)


def parameter_groups(model: SetEmbedder, config: OptimizerConfig) -> list[dict[str, Any]]:
    """What is trained, each part with its own learning rate."""
    inner = [
        (config.backbone_factor, getattr(model.image_encoder, "backbone", None)),
        (config.language_factor, getattr(model.text_encoder, "model", None)),
    ]
    parts = [
        *((factor, part) for factor, part in inner if part is not None),
        (config.image_factor, model.image_encoder),
        (config.text_factor, model.text_encoder),
        (config.sets_factor, torch.nn.ModuleList([model.image_sets, model.text_sets])),
        (1.0, model),  # what a similarity learns
    ]
    groups, taken = [], set[Tensor]()
    for factor, part in parts:
        own = [p for p in part.parameters() if p.requires_grad and p not in taken]
        taken.update(own)
        if own:
            groups.append({"params": own, "lr": config.lr * factor})
    return groups


def step_seed(seed: int, rank: int, step: int) -> int:
    """What the generators are seeded with before a step: 32 bits, as a CPU's has no more."""
    return (step + 2654435761 * (seed + 4099 * rank)) % 2**32


def cosine_with_warmup(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate: linear from 1 / warmup to 1, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def evaluate_sets(
    model: SetEmbedder, parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], folds: int | None = None
) -> RecallReport:
    """Recall over batches of (image sets, caption sets, image groups, caption groups)."""
    encoded, image_groups, caption_groups = encoded_by(model, parts)
    return evaluate_similarities(
        Similarities([encoded]), folds=folds, image_groups=image_groups, caption_groups=caption_groups
    )


def encoded_by(
    model: SetEmbedder, parts: list[tuple[Tensor, Tensor, Tensor, Tensor]]
) -> tuple[Encoded, Tensor, Tensor]:
    """Batches as in `evaluate_sets` as what a model made of a whole collection, and its groups; it holds no model."""
    image_sets, caption_sets, image_groups, caption_groups = (torch.cat(p) for p in zip(*parts, strict=True))
    kind: Any = model.config.similarity
    if kind == "match_probability":
        kind = partial(set_similarity, kind=kind, scale=model.match_scale.detach(), bias=model.match_bias.detach())
    encoded = Encoded(image_sets.float(), caption_sets.float(), kind, model.config.alpha)
    return encoded, image_groups, caption_groups


@torch.inference_mode()
def encode_dataset(
    model: SetEmbedder, data: RetrievalData, batch_size: int = 128
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What `evaluate_sets` takes, of a whole data set, on the device of the model."""
    model.eval()
    device = next(model.parameters()).device
    result = []
    for batch in evaluation_loader(data, batch_size):
        batch = {key: value.to(device) for key, value in batch.items()}
        images, texts = model.encode_image(batch), model.encode_text(batch)
        result.append((images.embeddings, texts.embeddings, batch["image_group"], batch["caption_group"]))
    return result


def fit(
    config: Config, model: SetEmbedder, data: RetrievalDataModule, folder: str | Path, resume: bool = False
) -> Path:
    """Trains a model, or goes on with a run that was stopped; returns the folder of the run's model.

    Args:
        config: of the run; ``model.config`` is taken from ``model``.
        model: its weights are where training starts.
        data: see `RetrievalDataModule`.
        folder: of the run; a folder that holds a run already is refused unless ``resume``.
        resume: go on from ``last.safetensors``. The result is, to the bit, that of a run that was not stopped (on one
            machine with one number of threads and of processes).

    Raises:
        ValueError, FileExistsError, FileNotFoundError: naming the setting or the folder.
    """
    if config.trainer.accumulate_embeddings < 0:
        given = config.trainer.accumulate_embeddings
        raise ValueError(f"trainer.accumulate_embeddings must be at least 0, got {given}")
    for name in ("epochs", "validate_every", "accumulate_batches"):
        if getattr(config.trainer, name) < 1:
            raise ValueError(f"trainer.{name} must be at least 1, got {getattr(config.trainer, name)}")
    if data.batches_per_step != config.trainer.accumulate_batches:
        raise ValueError(
            f"the data must be made with as many batches a step as trainer.accumulate_batches says, "
            f"{config.trainer.accumulate_batches}, got {data.batches_per_step}"
        )
    folder = Path(folder)
    last = folder / "last.safetensors"
    if resume and not last.is_file():
        raise FileNotFoundError(f"nothing to resume: no {last}")
    if not resume and last.exists():
        raise FileExistsError(f"{folder} holds a run already: resume it, or choose another folder")
    settings = config.trainer
    processes, here = launched()
    smallest = min(data.batch_size, len(data.train if data.dev is None else data.dev))
    if processes > smallest:
        raise ValueError(f"{processes} processes need as many images in a batch and in the dev set, got {smallest}")
    synchronised = processes > 1 and settings.accelerator != "cpu" and torch.cuda.is_available()
    if synchronised and settings.accumulate_embeddings and data.batch_size % processes:
        raise ValueError(
            "trainer.accumulate_embeddings on several GPUs needs a data.batch_size that they can share equally, got "
            f"{data.batch_size} for {processes}"
        )
    config.model = model.config
    if first():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "config.yaml", to_yaml(config).encode())
        remove_leftovers(folder)
    start = load_checkpoint(last)["global_step"] if resume else 0
    best = BestCheckpoint(folder) if data.dev is not None else None
    callbacks: list[Callback] = [EMAWeightAveraging(decay=settings.ema_decay)] if settings.ema_decay > 0 else []
    callbacks += [StopAtNonFinite(last), LastCheckpoint(last, settings.checkpoint_every)]
    callbacks += [WarnOfCollapse(config.loss)] if config.loss.kind == "triplet" else []
    callbacks += [best] if best is not None else []
    callbacks += [ProgressBar()] if settings.progress else []
    trainer = pl.Trainer(
        accelerator=settings.accelerator,
        devices=here,
        num_nodes=processes // here,
        strategy="auto" if processes == 1 else "ddp",
        sync_batchnorm=synchronised,
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.accumulate_batches,
        gradient_clip_val=settings.gradient_clip or None,
        check_val_every_n_epoch=settings.validate_every,
        log_every_n_steps=min(settings.log_every, data.steps_per_epoch),
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=[
            CSVLogger(folder, "metrics", f"from_step_{start}"),
            TensorBoardLogger(folder, "tensorboard", ""),
        ],
        plugins=[SafetensorsIO(), *precision_plugins(settings)],
        enable_checkpointing=best is not None,
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # StepBatches resumes by the step
        warnings.filterwarnings("ignore", ".*exists and is not empty.*")
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # what is frozen
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
        trainer.fit(RetrievalModule(config, model, data.steps_per_epoch), data, ckpt_path=last if resume else None)
    chosen = folder / "best.safetensors"
    if first():
        load_model(chosen if chosen.is_file() else last).save_pretrained(folder / "model")
    if processes > 1:
        torch.distributed.barrier()
    return folder / "model"


def precision_plugins(settings: TrainerConfig) -> list[Any]:
    """Autocast, and for float16 a scaler, on the device that trains.

    Asked for float16 on a CPU by name, Lightning would take bfloat16 instead.
    """
    if settings.precision == "32":
        return []
    device = "cuda" if settings.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    return [_MixedPrecision(cast(Any, settings.precision), device)]


class _MixedPrecision(MixedPrecision):
    """Lightning's, which refuses to clip gradients of a fused optimizer, also without a scaler, where nothing is in the
    way."""

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        if self.scaler is None:
            Precision.clip_gradients(self, *args, **kwargs)
        else:
            super().clip_gradients(*args, **kwargs)


_MixedPrecision.__qualname__ = MixedPrecision.__qualname__  # under which checkpoints keep the scaler


def load_model(path: str | Path) -> SetEmbedder:
    """A model from a run's folder, a folder of `SetEmbedder.save_pretrained`, or a checkpoint file; in evaluation mode.

    Of a run that has not ended, the best checkpoint so far is taken, or the last where there is none.
    """
    return load_trained(path)[0]


def load_trained(path: str | Path) -> tuple[SetEmbedder, DataConfig | None]:
    """`load_model`, and the section ``data`` of its run; None of a saved model that lies in no run's folder."""
    path = Path(path)
    if path.is_dir():
        for folder in (path, path / "model"):
            if (folder / "config.json").is_file():
                run = folder.resolve().parent / "config.yaml"
                known = run.is_file() and folder.resolve().name == "model"
                return SetEmbedder.from_pretrained(folder), load_config(run).data if known else None
        for name in ("best", "last"):
            if (path / f"{name}.safetensors").is_file():
                return load_trained(path / f"{name}.safetensors")
        raise FileNotFoundError(f"{path} holds neither a model nor a run")
    checkpoint = load_checkpoint(path)
    config = from_dict(Config, checkpoint["setemb"]["config"])
    words = checkpoint["setemb"]["vocabulary"]
    vocabulary = None if words is None else Vocabulary.from_text(words, config.model.text.tokenizer)
    model = SetEmbedder(config.model, vocabulary, pretrained=False)
    weights: Mapping[str, Tensor] = checkpoint["state_dict"]
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    return model.eval(), config.data


def train_precomp(config: Config, folder: str | Path, resume: bool = False) -> Path:
    """`fit` on a folder of data (`setemb.data.folder`), with sizes and vocabulary taken from its training split."""
    settings = config.data
    for name in ("dir", "images"):  # a run may be resumed from another folder
        if getattr(settings, name):
            setattr(settings, name, str(Path(getattr(settings, name)).absolute()))
    train, dev = open_split(settings, settings.train_split, training=True), open_split(settings, settings.dev_split)
    pl.seed_everything(config.trainer.seed, verbose=False)
    vocabulary = None
    if isinstance(train, PrecompDataset):
        config.model.image.dim_in = train.dim
    elif config.model.image.takes == "pictures":
        config.model.image.picture_size = settings.picture_size
        config.model.image.whole_picture = settings.whole_picture
    for data in (train, dev):
        check_fits(config.model.image, data, settings)
    if config.model.text.encoder == "bigru":
        vocabulary = Vocabulary.build(train.texts, settings.min_word_count, config.model.text.tokenizer)
        config.model.text.vocab_size = len(vocabulary)
    elif config.model.text.encoder == "features":
        features = FeatureCaptions.cached(train.texts, config.model.text.source, settings.cache)
        config.model.text.dim_in = features.states.shape[1]
    model = SetEmbedder(config.model, vocabulary, pretrained=not resume)
    if vocabulary is not None and config.model.text.word_vectors and not resume:
        start_at_vectors(model, vocabulary)
    for data in (train, dev):
        data.captions = captions_for(model, data.texts, settings)
    trainer = config.trainer
    module = RetrievalDataModule(
        train, dev, settings.batch_size, trainer.seed, settings.workers, trainer.accumulate_batches
    )
    return fit(config, model, module, folder, resume)


def evaluate_precomp(
    path: str | Path, settings: DataConfig, split: str = "dev", folds: int | None = None
) -> RecallReport:
    """Recall of a model (see `load_model`) on a split of a folder of data (`setemb.data.folder`)."""
    return evaluate_sets(*encode_precomp(path, settings, split), folds)


def evaluation_settings(model: SetEmbedder, trained: DataConfig | None, overrides: Sequence[str] = ()) -> DataConfig:
    """Settings to evaluate with: those of training, so that figures can be compared, changed by overrides.

    Args:
        model, trained: of `load_trained`. Without ``trained`` a model of pictures keeps how it looks at them.
        overrides: ``data.KEY=VALUE``. Another ``data.dir`` without ``data.images`` has its own folder of pictures.

    Raises:
        ValueError: how large pictures must be is said nowhere; errors as in `load_config`.
    """
    given = {override.partition("=")[0] for override in overrides}
    if trained is None:
        trained, image = DataConfig(), model.config.image
        if image.takes == "pictures" and image.picture_size:
            trained = replace(trained, picture_size=image.picture_size, whole_picture=image.whole_picture)
        elif image.takes == "pictures" and "data.picture_size" not in given:
            raise ValueError(
                "the model does not say at which size it looks at pictures: give data.picture_size=... (and "
                "data.whole_picture=true where it looked at whole ones), or set image.picture_size in its config.json"
            )
    settings = load_config({"data": asdict(trained)}, overrides).data
    if "data.images" not in given and Path(settings.dir).absolute() != Path(trained.dir).absolute():
        settings.images = ""
    return settings


def encode_precomp(
    path: str | Path | SetEmbedder, settings: DataConfig, split: str
) -> tuple[SetEmbedder, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """The model (or `load_model` of a path), and what it makes of a split of a folder of data."""
    data = open_split(settings, split)
    model = path if isinstance(path, SetEmbedder) else load_model(path)
    return model, encode_split(model, settings, data)


def encode_split(
    model: SetEmbedder, settings: DataConfig, data: CaptionedImages
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What a model makes of a split that `setemb.data.folder.open_split` opened; errors as in `check_fits`."""
    check_fits(model.config.image, data, settings)
    data.captions = captions_for(model, data.texts, settings)
    return encode_dataset(model, data, settings.batch_size)


def start_at_vectors(model: SetEmbedder, vocabulary: Vocabulary) -> None:
    """Sets the word embeddings to the vectors of ``config.text.word_vectors``; words without one stay as they are."""
    text = model.config.text
    weight = cast(GRUTextEncoder, model.text_encoder).embed.weight
    vectors, found = read_vectors(text.word_vectors, vocabulary.words, text.dim_word)
    if not found.any():
        raise ValueError(f"{text.word_vectors} holds none of the {len(found)} words of the training captions")
    with torch.no_grad():
        weight[found] = vectors[found]
    logging.getLogger(__name__).info("%d of %d words have vectors", int(found.sum()), len(found))


def check_fits(image: ImageConfig, data: CaptionedImages, settings: DataConfig) -> None:
    """Whether an image encoder takes such images.

    Raises:
        ValueError: it does not; naming both.
    """
    if image.takes != data.kind:
        raise ValueError(f"model.image.encoder takes {image.takes}, {settings.dir} has {data.kind}")
    if isinstance(data, PrecompDataset) and data.dim != image.dim_in:
        raise ValueError(
            f"the model takes image features of size {image.dim_in}, {settings.dir} has {data.dim} in its split "
            f"{data.name!r}"
        )


def captions_for(model: SetEmbedder, texts: Sequence[str], settings: DataConfig) -> Captions:
    """Captions in the form that the model's text encoder takes."""
    encoder = model.text_encoder
    if isinstance(encoder, (TransformerTextEncoder, OpenClipTextEncoder)):
        return TokenCaptions(texts, encoder.tokenize, settings.word_drop, encoder.mask_id, encoder.vocab_size)
    if model.vocabulary is not None:
        return WordCaptions(texts, model.vocabulary, settings.word_drop)
    return FeatureCaptions.cached(texts, model.config.text.source, settings.cache, settings.word_drop)


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The logged rows of a run in the order of their steps; of a step that was run twice, what was logged last."""
    parts = sorted(
        (int(path.parent.name.rpartition("_")[2]), path) for path in Path(folder).glob("metrics/*/metrics.csv")
    )
    rows: list[dict[str, float]] = []
    for start, path in parts:
        with path.open(newline="", encoding="utf-8") as file:
            new = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        rows = [row for row in rows if row["step"] < start] + new
    return rows
