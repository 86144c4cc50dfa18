"""Learned words (textual inversion, Gal et al. 2023): their embeddings, and where prompts have them."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn


class LearnedTokens(nn.Module):
    """Words, and the embeddings [n, D] of each as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []

    def add(self, word: str, vectors: Tensor) -> None:
        self.register_parameter(_parameter_name(word), nn.Parameter(vectors))
        self.words.append(word)

    def __getitem__(self, word: str) -> nn.Parameter:
        return self.get_parameter(_parameter_name(word))

    def __len__(self) -> int:
        return len(self.words)

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((word, self[word]) for word in self.words)

    def numbers(self, word: str) -> range:
        """The places of a word's embeddings among all of them, one word after the other."""
        lengths = [len(self[known]) for known in self.words]
        first = sum(lengths[: self.words.index(word)])
        return range(first, first + len(self[word]))


class Found(NamedTuple):
    """A word, and where a prompt holds it."""

    word: str
    start: int
    end: int


def find_words(prompt: str, words: Iterable[str]) -> list[Found]:
    """Where a prompt holds any of the words, from left to right: whole words, in any case of letters.

    `art` is in "Art, a dog" and not in "artist"; of two words that begin alike the longer one is taken.
    """
    longest_first = sorted(words, key=len, reverse=True)
    if not longest_first:
        return []
    whole = [
        (r"(?<!\w)" if re.match(r"\w", word) else "")
        + f"({re.escape(word)})"
        + (r"(?!\w)" if re.search(r"\w$", word) else "")
        for word in longest_first
    ]
    matches = re.finditer("|".join(whole), prompt, re.IGNORECASE)
    return [Found(longest_first[match.lastindex - 1], *match.span()) for match in matches if match.lastindex]


def _parameter_name(word: str) -> str:
    """A word as a parameter's name, which may hold no dot; `ldm.checkpoints.run_checkpoint` reads it back."""
    return "word:" + word.replace("%", "%25").replace(".", "%2E")
