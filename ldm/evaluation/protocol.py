"""Protocol of an `evaluation` in a config: metrics of the samples that a model generates of its subject."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from PIL import Image

from ldm.pipeline import Text2Image

Metrics = dict[str, Any]
Better = Literal["higher", "lower"]
OTHER_SEEDS = 100_000  # offset of the seeds of the noise floor
# How the class is sampled for its shift, by the suffix of the metric's name. The empty prompt plays no part
# without guidance.
CLASS_SAMPLINGS: dict[str, dict[str, float]] = {"": {}, "_unguided": {"guidance_scale": 1.0}}


class SubjectPrompts(NamedTuple):
    """Prompts of a subject and of its class, and the words in them."""

    subject: str  # "a photo of sks dog"
    of_class: str  # "a photo of a dog"
    identifier: str
    class_word: str

    @property
    def words(self) -> dict[str, str]:
        return {"identifier": self.identifier, "class_word": self.class_word}


class GeneratedImage(NamedTuple):
    """An image and the prompt that it was generated for, if that is known."""

    image: Image.Image
    prompt: str | None


def settings_of(evaluation: "Evaluation") -> dict[str, Any]:
    """How the images of an evaluation are generated, as `metrics.json` says it."""
    counts = {name: getattr(evaluation, name) for name in ("seeds", "class_samples", "seed")}
    return {**evaluation.sampling, "guidance_base": evaluation.guidance_base, **counts}


def sides_of(size: int | Sequence[int] | None) -> dict[str, int | None]:
    """{"height", "width"} in pixels of a side, or of both; None is the model's own."""
    height, width = size if isinstance(size, Sequence) else (size, size)
    return {"height": height, "width": width}


class Evaluation(Protocol):
    """`subject`, `measure` of the base and the trained model, then `summary`; or `measure_images` alone.

    For runs of several subjects it may have a method `bleeding` (see `StorybookEvaluation.bleeding`).
    """

    better: ClassVar[Mapping[str, Better]]  # of the numbers that `summary` gives
    guidance_base: bool  # `measure` needs the base's unconditional prediction
    sampling: Mapping[str, Any]  # how images are generated, by the pipeline's arguments

    def unfit(self, photos: Sequence[Image.Image], prompts: SubjectPrompts) -> list[str]:
        """Why it cannot judge this subject, a sentence for each reason; none if it can."""

    def subject(self, photos: Sequence[Image.Image]) -> Any:
        """What identifies the subject on the photos, as the other methods take it."""

    def measure(
        self, pipeline: Text2Image, *, subject: Any, prompts: SubjectPrompts, is_base: bool = False
    ) -> Any:
        """Measurements of one model's samples; for the base also of other seeds, for the noise floor."""

    def summary(self, after: Any, base: Any, subject: Any) -> Metrics:
        """The model's metrics by name, and mappings of metrics: intervals, base, ceiling, noise_floor."""

    def score(self, metrics: Mapping[str, Any]) -> float:
        """One number of a `summary`, by which checkpoints are ranked; higher is better."""

    def measure_images(
        self,
        samples: Sequence[GeneratedImage],
        *,
        subject: Any,
        prompts: SubjectPrompts,
        of_class: Sequence[GeneratedImage],
    ) -> Metrics:
        """Metrics and "intervals" of images of any tool; there may be no images of the class."""
