"""Words and their numbers, for a text encoder that is trained from scratch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from setemb.packages import require

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def words(text: str) -> list[str]:
    """The words of a text in lower case, punctuation left out."""
    return _WORD.findall(text.lower())


def treebank_words(text: str) -> list[str]:
    """Words and punctuation of a text in lower case, as the published code has them: sentence by sentence.

    Raises:
        ImportError: nltk is not installed.
    """
    tokenizer = _treebank_tokenizer()
    return [word for sentence in _SENTENCE_END.split(text.lower()) for word in tokenizer.tokenize(sentence)]


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"words": words, "treebank": treebank_words}


class Vocabulary:
    """Numbers of words. The first five are special: padding, unknown, masked, start and end of a text.

    Args:
        known: the words after these.
        tokenizer: how a text becomes words, "words" or "treebank" (the published code's).
    """

    SPECIAL = ("<pad>", "<unk>", "<mask>", "<start>", "<end>")
    PAD, UNKNOWN, MASK, START, END = range(5)

    def __init__(self, known: Sequence[str], tokenizer: str = "words") -> None:
        if tokenizer not in TOKENIZERS:
            raise ValueError(f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {tokenizer!r}")
        self.tokenizer = tokenizer
        self.words = [*self.SPECIAL, *known]
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = next(word for word, n in Counter(self.words).items() if n > 1)
            raise ValueError(f"a vocabulary holds each word once, got {twice!r} twice")

    @classmethod
    def build(cls, texts: Iterable[str], min_count: int = 1, tokenizer: str = "words") -> Vocabulary:
        """Of all words that occur at least ``min_count`` times, the most frequent first."""
        counts = Counter(word for text in texts for word in TOKENIZERS[tokenizer](text))
        known = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
        return cls(known, tokenizer)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Start, the numbers of the text's words, end."""
        return [self.START, *(self._ids.get(word, self.UNKNOWN) for word in TOKENIZERS[self.tokenizer](text)), self.END]

    def to_text(self) -> str:
        """A word a line."""
        return "".join(f"{word}\n" for word in self.words)

    @classmethod
    def from_text(cls, text: str, tokenizer: str = "words") -> Vocabulary:
        """The inverse of `to_text`."""
        lines = text.splitlines()
        if tuple(lines[: len(cls.SPECIAL)]) != cls.SPECIAL:
            raise ValueError(f"a vocabulary starts with {', '.join(cls.SPECIAL)}, got {lines[: len(cls.SPECIAL)]}")
        return cls(lines[len(cls.SPECIAL) :], tokenizer)


@cache
def _treebank_tokenizer() -> Any:
    return require("nltk.tokenize.destructive", "nltk").NLTKWordTokenizer()
