"""A text for networks that predict the next character, which everybody has, the same to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from metaoptim.core.checks import check_counts
from metaoptim.lopt.data import Data
from metaoptim.tasks.base import uniforms

SENTENCES, CHANCES = 2000, 24  # chances of a sentence, at most
NOUNS = ("river", "farmer", "garden", "teacher", "bird", "letter", "window", "painter", "road", "doctor", "stone", "king")
VERBS = ("follow", "remember", "find", "paint", "hear", "want", "answer", "help", "meet", "open", "forget", "like")
ADJECTIVES = ("old", "small", "quiet", "green", "distant", "clever", "cold", "bright", "strange", "gentle")
PLACES = ("near", "behind", "under", "without", "after", "beside")


def text(context: int = 32) -> Data:
    """Every stretch of `context` characters of a generated text, and those that follow them: x and y int64 [N, context].

    The text is no literature: 2,000 sentences of a small grammar with a seed of its own, in 22 letters, space and full stop.
    Spelling, the order of words, and verbs that agree with their subjects can be learnt; which word it is, only by chance.
    """
    check_counts(context=context)
    written = _written()
    symbols, codes = np.unique(written, return_inverse=True)
    windows = torch.from_numpy(codes).unfold(0, context + 1, 1)
    return Data(f"text-{context}", windows[:, :-1], windows[:, 1:], len(symbols))


@lru_cache(maxsize=1)
def _written() -> NDArray[np.uint8]:
    """The text, in ASCII."""
    sentences = (" ".join(_sentence(iter(u))) for u in uniforms(0, "text", 0, SENTENCES, CHANCES).tolist())
    return np.frombuffer((". ".join(sentences) + ".").encode("ascii"), np.uint8)


def _sentence(chances: Iterator[float]) -> Iterator[str]:
    many = next(chances) < 0.5
    yield from _phrase(chances, many)
    if next(chances) < 0.3:
        yield from ("that", *_phrase(chances, other := next(chances) < 0.5), _verb(chances, other))
    yield _verb(chances, many)
    yield from _phrase(chances, next(chances) < 0.5)
    if next(chances) < 0.5:
        yield from (_word(PLACES, chances), *_phrase(chances, next(chances) < 0.5))


def _phrase(chances: Iterator[float], many: bool) -> Iterator[str]:
    yield "the"
    if next(chances) < 0.4:
        yield _word(ADJECTIVES, chances)
    yield _word(NOUNS, chances) + ("s" if many else "")


def _verb(chances: Iterator[float], many: bool) -> str:
    return _word(VERBS, chances) + ("" if many else "s")


def _word(words: tuple[str, ...], chances: Iterator[float]) -> str:
    chance = next(chances)
    return words[int(len(words) * chance * chance)]  # the first ones far more often, as in every language
