"""A run's figures: the live networks measured before and after training."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ldm.config import check, instantiate
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import load_image
from ldm.errors import UserError
from ldm.evaluation.memo import ImageMemo, MemoPipeline
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

    pipeline: whether the base gives the unconditional prediction -> how images are drawn. Making a score
    reads the judge and the photos, so that whatever they lack is said before long work. Images of a base with
    a hash are drawn once in a process, which spares a study much time.
    """

    _of_bases: ClassVar[dict[str, ImageMemo]] = {}

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
        self.base_draw = pipeline(False)  # the base's own unconditional prediction is the base's anyway
        self.base_memo = self._of_bases.setdefault(base_hash, ImageMemo()) if base_hash else ImageMemo()
        self.prompts = Prompts(data.subject_prompt, data.prior_prompt, **data.words)
        self.subject = self.evaluation.subject([load_image(photo.path) for photo in data.subject_photos])

    def before(self) -> None:
        """Measures the untouched base."""
        if self.evaluation is not None:
            self.base = self._measure(MemoPipeline(self.base_draw, self.base_memo), is_base=True)

    def after(self, memo: ImageMemo | None = None) -> Mapping[str, Any]:
        """The figures of `metrics.json`, the base's beside them; call `before` first.

        Scores of the same weights may share a memo: images that both ask for are then drawn once.
        """
        if self.evaluation is None:
            return {}
        draw = MemoPipeline(self.draw, ImageMemo() if memo is None else memo)
        return self.evaluation.summary(self._measure(draw), self.base, self.subject)

    def _measure(self, draw: MemoPipeline, *, is_base: bool = False) -> Any:
        return self.evaluation.measure(draw, subject=self.subject, prompts=self.prompts, is_base=is_base)
