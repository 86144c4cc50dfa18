"""Concepts: what a run teaches, each with its photos and words; classes, which share prior images."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Self

from ldm.annotations import PositiveFloat
from ldm.data.prompts import (
    PRIOR_TEMPLATE,
    STYLE_TEMPLATE,
    SUBJECT_TEMPLATE,
    Words,
    check_prompts,
    contains,
    fill,
)
from ldm.data.streams import cycle
from ldm.errors import UserError

IDENTIFIER = "sks"  # of a single subject


@dataclass(frozen=True, kw_only=True)
class ConceptConfig:
    """One of the subjects or styles of a run.

    Args:
        root: folder of its photos.
        identifier: rare word that names it.
        class_word: its class, such as dog; null: a style, which has no class.
        name: what metrics.json and the report call it; null: its words, such as "sks dog".
        weight: share of the subject items, relative to the weights of the other concepts.
        subject_prompt, prior_prompt: templates with {identifier} and {class_word}; null is "a photo of sks
            dog" and "a photo of a dog", of a style "a picture in the style of sks" and no prior images.
        prior_root: folder of your own images of the class, for all concepts of that class.
    """

    root: str
    identifier: str
    class_word: str | None
    name: str | None = None
    weight: PositiveFloat = 1.0
    subject_prompt: str | None = None
    prior_prompt: str | None = None
    prior_root: str | None = None


@dataclass(frozen=True)
class Concept:
    """A subject or a style, with its prompts filled in. within: where its keys are, "concepts.0."."""

    name: str
    root: str
    words: Words
    subject_prompt: str
    prior_prompt: str | None  # None: there are no prior images of it
    prior_root: str | None
    weight: Fraction
    within: str = ""

    @property
    def is_style(self) -> bool:
        return self.words["class_word"] is None

    @property
    def trigger(self) -> str:
        """What names it in prompts: "sks dog"."""
        return " ".join(filter(None, self.words.values()))

    @classmethod
    def of(cls, config: ConceptConfig, *, within: str = "") -> Self:
        """Raises UserError for an unknown placeholder, or {class_word} of a style."""
        style = config.class_word is None
        words = {"identifier": config.identifier, "class_word": config.class_word}
        subject = config.subject_prompt or (STYLE_TEMPLATE if style else SUBJECT_TEMPLATE)
        prior = config.prior_prompt or (None if style else PRIOR_TEMPLATE)
        if config.prior_root is not None and prior is None:
            remedy = "Give the style a prior_prompt, of which they are images, or take the folder off."
            what = "A style without a prompt of its prior has no use for prior images"
            raise UserError(what, where=f"{within}prior_root", remedy=remedy)
        if config.weight <= 0:
            remedy = "Give it one above 0, or leave the concept out."
            raise UserError(f"The weight is {config.weight}", where=f"{within}weight", remedy=remedy)
        return cls(
            name=config.name or " ".join(filter(None, words.values())),
            root=config.root,
            words=words,
            subject_prompt=fill(subject, **words),
            prior_prompt=fill(prior, **words) if prior else None,
            prior_root=config.prior_root,
            weight=Fraction(str(config.weight)),
            within=within,
        )

    def check(self, *, has_priors: bool) -> None:
        """Raises UserError for words or prompts that cannot be learned, or photos that are the prior's."""
        prior_prompt = self.prior_prompt if has_priors else None
        prompts = {"subject_prompt": self.subject_prompt, "prior_prompt": prior_prompt}
        check_prompts(**self.words, **prompts, within=self.within)
        if has_priors and self.prior_root and Path(self.prior_root).resolve() == Path(self.root).resolve():
            remedy = "Give another folder of the class, or none to generate prior images."
            raise UserError("Subject and prior are the same folder", where=self.prior_root, remedy=remedy)


def single_concept(
    *, subject_root: str | None, class_word: str | None, identifier: str | None, **rest: str | None
) -> tuple[Concept, ...]:
    """The one concept of a run without `concepts`; rest: its prompts and its prior_root."""
    for key, value in (("subject_root", subject_root), ("class_word", class_word)):
        if value is None:
            remedy = "Give it, or a list of `concepts`."
            raise UserError(f"`{key}` is missing", where=f"data.params.{key}", remedy=remedy)
    word = IDENTIFIER if identifier is None else identifier
    return (Concept.of(ConceptConfig(root=subject_root, class_word=class_word, identifier=word, **rest)),)


def several_concepts(
    configs: Sequence[ConceptConfig], *, beside: Mapping[str, str | None]
) -> tuple[Concept, ...]:
    """The concepts of a list; beside: the keys of a single concept, which cannot be given too.

    Raises UserError for those, and for concepts that prompts or pages cannot tell apart.
    """
    given = [key for key, value in beside.items() if value is not None]
    if given:
        what = f"`{given[0]}` is of a single subject, and `concepts` has its own"
        remedy = f"Set {', '.join(f'{key}: null' for key in given)}, or take `concepts` off."
        raise UserError(what, where=f"data.params.{given[0]}", remedy=remedy)
    if not configs:
        raise UserError("The list is empty", where="concepts", remedy="Give one concept or more.")
    concepts = tuple(Concept.of(config, within=f"concepts.{k}.") for k, config in enumerate(configs))
    for key, values in {
        "identifier": [concept.words["identifier"].lower() for concept in concepts],
        "name": [concept.name for concept in concepts],
    }.items():
        value, times = Counter(values).most_common(1)[0]
        if times > 1:
            last = max(k for k, other in enumerate(values) if other == value)
            remedy = "Give each concept its own."
            what = f'"{value}" is the {key} of {times} concepts'
            raise UserError(what, where=f"concepts.{last}.{key}", remedy=remedy)
    for concept in concepts:
        _check_apart(concept, concepts)
    cycle([concept.weight for concept in concepts])
    return concepts


def _check_apart(concept: Concept, concepts: Sequence[Concept]) -> None:
    """Refuses an identifier in a prompt of another concept, which would learn both."""
    word = concept.words["identifier"]
    for other in concepts:
        for key in ("subject_prompt", "prior_prompt"):
            prompt = getattr(other, key)
            if other is not concept and prompt is not None and contains(prompt, word):
                what = f'The identifier "{word}" of {concept.name} is in "{prompt}" of {other.name}'
                remedy = "Choose another identifier, or write another prompt."
                raise UserError(what, where=f"{other.within}{key}", remedy=remedy)


@dataclass(frozen=True)
class PriorClass:
    """Prior images of one prompt, shared by the concepts of the class.

    root: folder of given images; None: the base generates them. concepts: names of those that share them.
    """

    prompt: str
    root: str | None
    words: Words
    weight: Fraction
    concepts: tuple[str, ...]


def classes_of(concepts: Sequence[Concept], *, num_priors: int) -> tuple[PriorClass, ...]:
    """The classes with prior images, each with the weight of all of its concepts.

    Raises UserError for two folders of one class.
    """
    prompts = dict.fromkeys(concept.prior_prompt for concept in concepts if concept.prior_prompt is not None)
    classes = []
    for prompt in prompts:
        own = [concept for concept in concepts if concept.prior_prompt == prompt]
        roots = list(dict.fromkeys(concept.prior_root for concept in own if concept.prior_root is not None))
        if len(roots) > 1:
            what = f'"{prompt}" has two folders of prior images, {roots[0]} and {roots[1]}'
            raise UserError(what, where=f"{own[-1].within}prior_root", remedy="Put all images into one.")
        if roots or num_priors > 0:
            weight, names = sum(concept.weight for concept in own), tuple(concept.name for concept in own)
            classes.append(PriorClass(prompt, roots[0] if roots else None, own[0].words, weight, names))
    return tuple(classes)


def filled_for(prompts: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """Templates with the words of each concept; without placeholders, or equal ones, once.

    A style has those without {class_word}; if these are none with its identifier, its own prompt.
    """
    found = [text for _, _, text in filled_templates(prompts, concepts)]
    for concept in concepts:
        if concept.is_style and not any(contains(prompt, concept.words["identifier"]) for prompt in found):
            found.append(concept.subject_prompt)
    return list(dict.fromkeys(found)) if len(concepts) > 1 else found


def filled_templates(prompts: Sequence[str], concepts: Sequence[Concept]) -> list[tuple[int, Concept, str]]:
    """Number of a template, concept and text, for each concept whose words a template can have."""
    return [
        (k, concept, fill(prompt, **concept.words))
        for k, prompt in enumerate(prompts)
        for concept in concepts
        if _has_words(prompt, concept)
    ]


def rows_of_template(template: str, prompts: Sequence[str], concepts: Sequence[Concept]) -> dict[str, int]:
    """The texts of one of the templates in `filled_for` -> their places there: the numbers of their rows."""
    rows = filled_for(prompts, concepts)
    texts = (text for k, _, text in filled_templates(prompts, concepts) if prompts[k] == template)
    return {text: rows.index(text) for text in texts}


def _has_words(prompt: str, concept: Concept) -> bool:
    return not concept.is_style or "{class_word}" not in prompt
