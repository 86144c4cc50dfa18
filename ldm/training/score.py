"""A run's figures: the live networks measured before and after training."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from ldm.config import instantiate
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import load_image
from ldm.evaluation.protocol import Evaluation, Prompts
from ldm.pipeline import Text2Image


class Score:
    """Measures what `draw` draws, by the config's `evaluation`; without one there are no figures.

    Making it reads the judge and the photos, so that whatever they lack is said before long work. A base with
    a hash is measured once in a process for the same photos and prompts, which spares a study much time.
    """

    _bases: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, evaluation: dict | None, draw: Text2Image, data: DreamBoothDataModule, *, base_hash: str = ""
    ):
        self.evaluation: Evaluation | None = instantiate(evaluation) if evaluation else None
        if self.evaluation is None:
            return
        self.draw = draw
        self.prompts = Prompts(data.subject_prompt, data.prior_prompt, **data.words)
        self.subject = self.evaluation.subject([load_image(photo.path) for photo in data.subject_photos])
        photos = [photo.sha256 for photo in data.subject_photos]
        asked = {"evaluation": evaluation, "prompts": self.prompts, "photos": photos, "size": data.size}
        self.key = json.dumps([base_hash, asked], sort_keys=True) if base_hash else None

    def before(self) -> None:
        """Measures the untouched base."""
        if self.evaluation is None:
            return
        self.base = self._bases.get(self.key) or self._measure(is_base=True)
        if self.key is not None:
            self._bases[self.key] = self.base

    def after(self) -> Mapping[str, Any]:
        """The figures of `metrics.json`, the base's beside them; call `before` first."""
        if self.evaluation is None:
            return {}
        return self.evaluation.summary(self._measure(), self.base, self.subject)

    def _measure(self, *, is_base: bool = False) -> Any:
        return self.evaluation.measure(self.draw, subject=self.subject, prompts=self.prompts, is_base=is_base)
