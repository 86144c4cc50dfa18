"""Metrics of a run: the live networks are evaluated before and after training."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ldm.annotations import Node
from ldm.config import check, instantiate, with_params
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import ImageFiles
from ldm.errors import UserError
from ldm.evaluation.memo import ImageMemo, MemoPipeline
from ldm.evaluation.protocol import Evaluation
from ldm.evaluation.subjects import JudgedSubjects
from ldm.pipeline import Text2Image
from ldm.runs.sampling import in_shapes
from ldm.schema import RunConfig
from ldm.targets import get_class


def evaluation_nodes(config: RunConfig) -> dict[str, Node]:
    """The evaluations of a run by the keys that ask for them; a run without any has no metrics.

    Raises UserError for params of `evaluate_also` and `online_eval` that the evaluation does not take.
    """
    asked = {f"evaluate_also.{name}": params for name, params in (config.evaluate_also or {}).items()}
    if asked and not config.evaluation:
        remedy = "Add one, or leave `evaluate_also` out."
        raise UserError("`evaluate_also` needs an `evaluation`", where="evaluate_also", remedy=remedy)
    if not config.evaluation:
        return {}
    asked["online_eval"] = config.online_eval.params
    kind = get_class(config.evaluation["target"])
    if not all(hasattr(kind, method) for method in ("subject", "measure", "summary", "score")):
        remedy = "Name one of ldm.evaluation, such as ldm.evaluation.photos.PhotoEvaluation."
        raise UserError(f"{kind.__name__} is no evaluation", where="evaluation.target", remedy=remedy)
    nodes = {"evaluation": config.evaluation}
    for where, params in asked.items():
        nodes[where] = with_params(config.evaluation, params)
        check({where: nodes[where]}, {where: Node})
    return nodes


def judged_subjects(evaluation: Evaluation, data: DreamBoothDataModule) -> JudgedSubjects:
    """The subjects of a run's photos under an evaluation; their files are read when they are judged."""
    photos = {name: ImageFiles(p.path for p in found) for name, found in data.images.photos.items()}
    return JudgedSubjects(evaluation, data.concepts, photos)


class BeforeAfterEvaluation:
    """Evaluates the images of a run by the config's `evaluation`; there are no metrics without one, and none
    of a subject that it cannot judge, or of a style.

    pipeline: whether the base gives the unconditional prediction -> the pipeline. The constructor reads the
    judge and the photos, so errors in them are raised before long work. base: names the base and how it is
    read, if it is known; its images are then generated once in a process, which saves a study much time.
    """

    _of_bases: ClassVar[dict[str, ImageMemo]] = {}

    def __init__(
        self,
        evaluation: Node | None,
        pipeline: Callable[[bool], Text2Image],
        data: DreamBoothDataModule,
        *,
        base: str = "",
    ):
        self.evaluation: Evaluation | None = instantiate(evaluation) if evaluation else None
        if self.evaluation is None:
            return
        self.judged = judged_subjects(self.evaluation, data)
        if not self.judged.subjects:
            self.evaluation = None
            return
        self.data = data
        self.pipeline = pipeline(self.evaluation.guidance_base)
        self.base_pipeline = pipeline(False)  # of the base, both predictions are the base's anyway
        self.base_memo = self._of_bases.setdefault(base, ImageMemo()) if base else ImageMemo()

    def before(self) -> None:
        """Evaluates the untouched base."""
        if self.evaluation is not None:
            self.base = self.judged.measure(
                self._in_buckets(self.base_pipeline, self.base_memo), is_base=True
            )

    def after(self, memo: ImageMemo | None = None) -> Mapping[str, Any]:
        """The metrics of `metrics.json`, with those of the base; call `before` first.

        Evaluations of the same weights may share a memo: images that both need are generated once.
        """
        if self.evaluation is None:
            return {}
        pipeline = self._in_buckets(self.pipeline, ImageMemo() if memo is None else memo)
        return self.judged.summary(self.judged.measure(pipeline), self.base)

    def _in_buckets(self, pipeline: Text2Image, memo: ImageMemo) -> Callable[..., Any]:
        """The pipeline, with the shapes of the photos where they have their own."""
        return in_shapes(MemoPipeline(pipeline, memo), self.data.sample_shapes)

    def noise_floor(self) -> Mapping[str, float]:
        """What the metrics of a shift are by chance, by this number of samples; call `before` first."""
        return self.judged.summary(self.base, self.base).get("noise_floor", {})
