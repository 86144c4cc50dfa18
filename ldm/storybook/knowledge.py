"""What the storybook knows: the words of its captions. Of others its base has seen letters at most."""

import re
from collections.abc import Sequence

from ldm.storybook.world import BAND_WORDS, BANDS, CLASSES, COLORS, CONTEXTS, DETAIL_WORDS, PATTERNS

FRAMES = ("a photo of", "a picture of", "an", "and", "with", "collar")
WORD = re.compile(r"[^\W\d_]+")
WORDS = frozenset(
    word
    for text in (
        *(*FRAMES, *CLASSES, *COLORS, *PATTERNS, *BANDS[1:], *BAND_WORDS.values(), *CONTEXTS.values()),
        *(text for texts in DETAIL_WORDS.values() for text in texts),
    )
    for word in WORD.findall(text)
)


def unknown_words(prompt: str, *, identifiers: Sequence[str]) -> list[str]:
    """Words of a prompt that no caption of the storybook has, without the identifiers, in their order."""
    words = "|".join(map(re.escape, identifiers))
    without = re.sub(rf"(?<!\w)({words})(?!\w)", " ", prompt, flags=re.IGNORECASE)
    return [word for word in dict.fromkeys(WORD.findall(without.lower())) if word not in WORDS]
