"""What `evaluation` in a config stands for: a way to measure what a model draws of its subject."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from PIL import Image

from ldm.pipeline import Text2Image

Figures = dict[str, Any]
OTHER_SEEDS = 100_000  # from the first seed of a measure to the first of its noise floor


class Prompts(NamedTuple):
    """What a subject is called."""

    subject: str  # "a photo of sks dog"
    of_class: str  # "a photo of a dog"
    identifier: str
    class_word: str

    @property
    def words(self) -> dict[str, str]:
        return {"identifier": self.identifier, "class_word": self.class_word}


class Picture(NamedTuple):
    """A picture and the prompt that it was drawn for, if that is known."""

    image: Image.Image
    prompt: str | None


class Evaluation(Protocol):
    """`subject`, then `measure` of the base and of the trained model, then `summary`; or `plain` alone."""

    guidance_base: bool  # whether `measure` wants a model whose unconditional prediction is the base's

    def subject(self, photos: Sequence[Image.Image]) -> Any:
        """Who is on the photos, as `measure` and `plain` take it."""

    def measure(self, draw: Text2Image, *, subject: Any, prompts: Prompts, is_base: bool = False) -> Any:
        """What one model draws; of the base also what the noise floor of the class's shift needs."""

    def summary(self, after: Any, base: Any, subject: Any) -> Figures:
        """The model's metrics by name, and mappings of such: intervals, base, ceiling, noise_floor."""

    def score(self, figures: Mapping[str, Any]) -> float:
        """One number of a `summary`, by which checkpoints compete; higher is better."""

    def plain(
        self, pictures: Sequence[Picture], *, subject: Any, prompts: Prompts, of_class: Sequence[Picture]
    ) -> Figures:
        """Figures and "intervals" of pictures that any tool drew; those of the class may be none."""
