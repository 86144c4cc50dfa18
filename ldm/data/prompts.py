"""Prompts: templates with identifier and class word, lists of them, and checks of what users write."""

import logging
import os.path
import re
from collections.abc import Mapping
from pathlib import Path

from ldm.errors import UserError
from ldm.shipped import CONFIGS, find_file

Words = Mapping[str, str | None]  # {identifier} and {class_word}

log = logging.getLogger(__name__)

PROMPTS = CONFIGS / "prompts"
SUBJECT_TEMPLATE = "a photo of {identifier} {class_word}"  # Ruiz et al. 2023, section 3.2: "a [V] [class]"
STYLE_TEMPLATE = "a picture in the style of {identifier}"  # of what has no class
PRIOR_TEMPLATE = "a photo of a {class_word}"
BEFORE_A_PHRASE = frozenset("and as at behind beside by for from in like near of on or to under with".split())
# Words that every base model knows: an identifier should not have a meaning already.
COMMON_WORDS = frozenset(
    """
    a about all an and any are as at baby back bag ball bear beautiful bed best big bird black blue boat
    body book bottle bowl box boy bread brown cake camera can candle car cartoon cat chair child city clock
    cloud coat color colour computer cow cup cute dark day desk dog doll door dress duck ear earth eye face
    family fish flower food foot forest fox friend fruit girl glass gold good gray grass green grey hair
    hand happy hat head home horse hot house image in is it jacket king lamp large leaf light lion little
    long love man men metal milk monster moon mountain mouse my new nice night of old on one orange pen
    people person phone photo picture pink plane plant plate pretty puppy purple queen rabbit rain red river
    road robot rock room rose round sea shoe sky small snow special star stone street subject sun table
    teapot the thing this tiger toy train tree unique vase violet wall watch water white wind window woman
    women wood world yellow young
    """.split()
)


def fill(template: str, *, identifier: str | None, class_word: str | None) -> str:
    """Fills in {identifier} and {class_word}. Raises UserError if one is None, or for another placeholder."""
    words = {"identifier": identifier, "class_word": class_word}

    def word(match: re.Match[str]) -> str:
        if match[1] not in words:
            remedy = "Use only {identifier} and {class_word}."
            raise UserError(f"Unknown placeholder {match[0]}", where=f'prompt "{template}"', remedy=remedy)
        if words[match[1]] is None:
            what = f"There is no value for {match[0]}"
            raise UserError(what, where=f'prompt "{template}"', remedy=f"Give {match[1]}.")
        return words[match[1]]

    return re.sub(r"\{([^{}]*)\}", word, template)


def has_placeholder(template: str) -> bool:
    """Whether it names a word that `fill` fills in."""
    return re.search(r"\{(identifier|class_word)\}", template) is not None


def check_prompts(
    *,
    identifier: str,
    class_word: str | None,
    subject_prompt: str,
    prior_prompt: str | None,
    within: str = "",
) -> None:
    """Checks filled prompts. Raises UserError if the identifier cannot be learned; warns of bad choices.

    class_word: None is that of a style. within: what comes before the keys in messages, "concepts.0.".
    """
    for name, value in (("identifier", identifier), ("class_word", class_word)):
        if value is not None and not value.strip():
            where = f"{within}{name}"
            raise UserError("The word is empty", where=where, remedy="Give one, such as sks or dog.")
    require_identifier(subject_prompt, identifier=identifier, where=f"{within}subject_prompt")
    if identifier.lower() in COMMON_WORDS:
        warning = "%sidentifier: %r is a common word with its own meaning; choose a rare one."
        log.warning(warning, within, identifier)
    if prior_prompt is None:
        return
    if contains(prior_prompt, identifier):
        raise UserError(
            f'The identifier "{identifier}" is in the prompt of the class, "{prior_prompt}"',
            where=f"{within}prior_prompt",
            remedy="Remove it.",
        )
    if class_word is not None and not contains(prior_prompt, class_word):
        log.warning("%sprior_prompt: %r does not name the class %r.", within, prior_prompt, class_word)


def require_identifier(caption: str, *, identifier: str, where: object) -> None:
    """Raises UserError for a caption of the subject without the identifier, which could not be learned."""
    if not contains(caption, identifier):
        raise UserError(
            f'The identifier "{identifier}" is missing from "{caption}"',
            where=where,
            remedy="Write {identifier} before the class word.",
        )


def contains(prompt: str, words: str) -> bool:
    """Whether `prompt` contains `words` as whole words, ignoring case."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", prompt, re.IGNORECASE) is not None


def class_caption(caption: str, *, identifier: str, class_word: str) -> str:
    """A caption of the subject as one of its class: the class word takes the identifier's place.

    "sks dog" becomes "dog" as in "my dog", or "a dog" where no other word of the phrase stands before it;
    an identifier alone becomes the class word. Case is ignored.
    """
    named = rf"(?<!\w){re.escape(identifier)}(?!\w)(?:\s+(?P<word>{re.escape(class_word)}\w*))?"

    def of_class(match: re.Match[str]) -> str:
        before = re.search(r"(\w+)\s*$", caption[: match.start()])
        word = match["word"] or class_word
        begins = before is None or before[1].lower() in BEFORE_A_PHRASE
        return f"a {word}" if begins and word.lower() == class_word.lower() else word

    return re.sub(named, of_class, caption, flags=re.IGNORECASE)


def find_prompts(file: str | Path) -> Path | None:
    """The file of `read_prompts`, by its path or its name; None if there is none."""
    return next((p for p in (find_file(file), PROMPTS / f"{file}.txt") if os.path.isfile(p)), None)


def read_prompts(file: str | Path, *, identifier: str | None, class_word: str | None) -> list[str]:
    """Filled prompts of a text file, one per line; empty lines and lines that begin with # are skipped.

    file: a path, or a name in configs/prompts/.
    """
    path = find_prompts(file)
    if path is None:
        names = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.txt"))) or "none"
        raise UserError("There is no such prompt file", where=file, remedy=f"Known names: {names}.")
    lines = [line.strip() for line in read_lines(path)]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError("The file contains no prompt", where=path, remedy="Write one per line.")
    return [fill(prompt, identifier=identifier, class_word=class_word) for prompt in prompts]


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file. Raises UserError if it cannot be read."""
    return read_text(path).split("\n")  # `splitlines` also splits at U+0085, U+2028 and more


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, whose lines end in \\n. Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The text cannot be read: {error}", where=path, remedy="Save it as UTF-8."
        ) from error
