"""What the storybook knows: the words of its captions. Of others its base has seen letters at most."""

import re

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


def unknown_words(prompt: str, *, identifier: str) -> list[str]:
    """Words of a prompt that no caption of the storybook has, without the identifier, in their order."""
    without = re.sub(rf"(?<!\w){re.escape(identifier)}(?!\w)", " ", prompt, flags=re.IGNORECASE)
    return [word for word in dict.fromkeys(WORD.findall(without.lower())) if word not in WORDS]
