"""A run's figures: the live networks measured before and after training."""

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ldm.config import check, instantiate
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import load_image
from ldm.errors import UserError
from ldm.evaluation.protocol import Evaluation, Prompts
from ldm.pipeline import Text2Image


def with_params(evaluation: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The node of an evaluation with other params."""
    return {**evaluation, "params": {**(evaluation.get("params") or {}), **params}}


def check_evaluations(plain: Mapping[str, Any]) -> None:
    """Refuses params of `evaluate_also` and `measures` that the evaluation does not take."""
    evaluation = plain.get("evaluation")
    asked = {f"evaluate_also.{name}": params for name, params in (plain.get("evaluate_also") or {}).items()}
    if asked and not evaluation:
        remedy = "Add one, or leave `evaluate_also` out."
        raise UserError("There is no `evaluation` to repeat", where="evaluate_also", remedy=remedy)
    asked["measures"] = plain.get("measures", {}).get("params", {})
    for where, params in asked.items():
        if not isinstance(params, Mapping):
            remedy = "Write, for example, {guidance_scale: 4.0}."
            raise UserError(f"{params!r} are no params of an evaluation", where=where, remedy=remedy)
        if params and evaluation:
            check({where: with_params(evaluation, params)}, {where: dict})


class Score:
    """Measures what a run draws, by the config's `evaluation`; without one there are no figures.

    pipeline: whether the base gives the unconditional prediction -> how images are drawn.
    Making a score reads the judge and the photos, so that whatever they lack is said before long work. A base
    with a hash is measured once in a process for the same photos and prompts, which spares a study much time.
    """

    _bases: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        evaluation: dict | None,
        pipeline: Callable[[bool], Text2Image],
        data: DreamBoothDataModule,
        *,
        base_hash: str = "",
    ):
        self.evaluation: Evaluation | None = instantiate(evaluation) if evaluation else None
        if self.evaluation is None:
            return
        self.draw = pipeline(self.evaluation.guidance_base)
        self.prompts = Prompts(data.subject_prompt, data.prior_prompt, **data.words)
        self.subject = self.evaluation.subject([load_image(photo.path) for photo in data.subject_photos])
        photos = [photo.sha256 for photo in data.subject_photos]
        own = {**evaluation.get("params", {}), "guidance_base": False}  # of the base it is the same
        asked = {
            "evaluation": {**evaluation, "params": own},
            "prompts": self.prompts,
            "photos": photos,
            "size": data.size,
        }
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
