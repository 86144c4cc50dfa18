"""A run's figures: the live networks measured before and after training."""

from collections.abc import Mapping
from typing import Any

from ldm.config import instantiate
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import load_image
from ldm.evaluation.protocol import Evaluation, Prompts
from ldm.pipeline import Text2Image


class Score:
    """Measures what `draw` draws, by the config's `evaluation`; without one there are no figures.

    Making it reads the judge and the photos, so that whatever they lack is said before long work.
    """

    def __init__(self, evaluation: dict | None, draw: Text2Image, data: DreamBoothDataModule):
        self.evaluation: Evaluation | None = instantiate(evaluation) if evaluation else None
        if self.evaluation is None:
            return
        self.draw = draw
        self.prompts = Prompts(data.subject_prompt, data.prior_prompt, **data.words)
        self.subject = self.evaluation.subject([load_image(photo.path) for photo in data.subject_photos])

    def before(self) -> None:
        """Measures the untouched base."""
        if self.evaluation is not None:
            self.base = self._measure()

    def after(self) -> Mapping[str, Any]:
        """The figures of `metrics.json`, the base's beside them; call `before` first."""
        if self.evaluation is None:
            return {}
        return self.evaluation.summary(self._measure(), self.base, self.subject)

    def _measure(self) -> Any:
        return self.evaluation.measure(self.draw, subject=self.subject, prompts=self.prompts)
