"""The subjects of a run under one evaluation: each is measured alone, and together they have means."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ldm.data.concepts import Concept
from ldm.evaluation.bleeding import combined
from ldm.evaluation.protocol import Evaluation, Metrics, SubjectPrompts
from ldm.pipeline import Text2Image

Photos = Sequence[Image.Image]


class JudgedSubjects:
    """The concepts of a run that an evaluation can judge: no styles, and none that it is unfit for.

    photos: by the concepts' names. `unfit` has its reasons against a subject, by name.
    """

    def __init__(self, evaluation: Evaluation, concepts: Sequence[Concept], photos: Mapping[str, Photos]):
        self.evaluation = evaluation
        self.several = len(concepts) > 1
        self.prompts: dict[str, SubjectPrompts] = {}
        self.subjects: dict[str, Any] = {}
        self.unfit: dict[str, list[str]] = {}
        for concept in (concept for concept in concepts if not concept.is_style):
            self._add(concept, photos[concept.name])

    def _add(self, concept: Concept, photos: Photos) -> None:
        prompts = SubjectPrompts(concept.subject_prompt, concept.prior_prompt, **concept.words)
        if against := self.evaluation.unfit(photos, prompts):
            self.unfit[concept.name] = against
            return
        self.prompts[concept.name] = prompts
        self.subjects[concept.name] = self.evaluation.subject(photos)

    def measure(self, pipeline: Text2Image, *, is_base: bool = False) -> dict[str, Any]:
        """Name of a subject -> the evaluation's measurements of one model."""
        return {
            name: self.evaluation.measure(
                pipeline, subject=subject, prompts=self.prompts[name], is_base=is_base
            )
            for name, subject in self.subjects.items()
        }

    def summary(self, after: Mapping[str, Any], base: Mapping[str, Any]) -> Metrics:
        """The metrics of the one subject, or the means of several with those of each (`combined`)."""
        each = {
            name: self.evaluation.summary(after[name], base[name], subject)
            for name, subject in self.subjects.items()
        }
        if not self.several:
            return next(iter(each.values()))
        bleeding = {}
        if hasattr(self.evaluation, "bleeding"):
            class_words = {name: prompts.class_word for name, prompts in self.prompts.items()}
            about = {"subjects": self.subjects, "class_words": class_words}
            bleeding = self.evaluation.bleeding(after, base, **about)
        return combined(each, bleeding)
