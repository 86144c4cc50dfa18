"""What `evaluation` in a config stands for: a way to measure what a model draws of its subject."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from PIL import Image

from ldm.pipeline import Text2Image

Figures = dict[str, Any]


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

    def subject(self, photos: Sequence[Image.Image]) -> Any:
        """Who is on the photos, as `measure` and `plain` take it."""

    def measure(self, draw: Text2Image, *, subject: Any, prompts: Prompts) -> Any:
        """What one model draws."""

    def summary(self, after: Any, base: Any, subject: Any) -> Figures:
        """The model's figures by name, and "intervals", "base", "ceiling": mappings with the same names."""

    def score(self, figures: Mapping[str, Any]) -> float:
        """One number of a `summary`, by which checkpoints compete; higher is better."""

    def plain(
        self, pictures: Sequence[Picture], *, subject: Any, prompts: Prompts, of_class: Sequence[Picture]
    ) -> Figures:
        """Figures and "intervals" of pictures that any tool drew; those of the class may be none."""
