"""A model on the storybook, scored by the judge: the subject, the prompt, the class, all in seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ldm.data.images import fit_image, to_tensor
from ldm.diffusion.samplers import SamplerName
from ldm.errors import UserError
from ldm.evaluation.metrics import (
    Interval,
    Reading,
    bootstrap,
    carries_subject,
    diversity,
    majority,
    subject_fidelity,
)
from ldm.evaluation.protocol import Figures, Picture, Prompts
from ldm.pipeline import Text2Image
from ldm.precision import Precision
from ldm.storybook.dataset import BOOK
from ldm.storybook.judge import SHIPPED, SIZE, Judge
from ldm.storybook.world import CONTEXTS, SUBJECT_ATTRIBUTES, Scene, full_caption, sample_scene

EXAM = 999  # the book whose captions a base is examined on; no training reads it


@dataclass(frozen=True)
class Subject:
    """The individual on the photos: its attributes, and the share of them that the judge reads per photo."""

    attributes: Mapping[str, int]
    ceiling: float


@dataclass(frozen=True)
class Measured:
    """What the judge saw in one model's pictures; S seeds, C contexts, N pictures of the class."""

    fidelity: Tensor  # [S, C] share of the subject's attributes
    context: Tensor  # [S, C] 1 where the place is the one asked for
    carries: Tensor  # [N] 1 where a picture of the class is the subject itself
    diversity: float  # of the pictures of the class

    def figures(self, base: "Measured") -> dict[str, float]:
        """The headline figures, those of the class relative to the base's."""
        figures = {
            "subject_fidelity": self.fidelity.mean(),
            "prompt_fidelity": self.context.mean(),
            "class_drift": self.carries.mean() - base.carries.mean(),
            "diversity_ratio": self.diversity / base.diversity,
        }
        return {name: round(float(value), 4) for name, value in figures.items()}

    def intervals(self, base: "Measured") -> dict[str, Interval]:
        """95 % intervals over seeds; the class's pictures of both models share theirs, so they are paired.

        None is given of the diversity: a resample repeats pictures, which biases distances.
        """

        def mean(rows: Tensor) -> float:
            return float(rows.mean())

        return {
            "subject_fidelity": bootstrap(self.fidelity, mean),
            "prompt_fidelity": bootstrap(self.context, mean),
            "class_drift": bootstrap(self.carries - base.carries, mean),
        }


class StorybookEvaluation:
    """How a model is measured: which pictures are drawn, and who reads them.

    Args:
        seeds: pictures of the subject in each of the 8 contexts.
        class_samples: pictures of the class without the identifier.
        seed: of the first picture.
        precision: of the networks that draw; "auto" is bf16 on a CUDA device and fp32 elsewhere.
        judge: its weights; None takes the shipped ones.
    """

    def __init__(
        self,
        *,
        seeds: int = 4,
        class_samples: int = 64,
        sampler: SamplerName = "ddim",
        steps: int = 25,
        guidance_scale: float = 4.0,
        seed: int = 1000,
        batch_size: int = 16,
        precision: Precision = "auto",
        judge_file: str | None = None,
    ):
        if seeds < 1 or class_samples < 2:
            remedy = "Take at least 1 of `seeds` and 2 of `class_samples`."
            raise UserError("There is nothing to measure", where="evaluation", remedy=remedy)
        self.seeds, self.class_samples, self.seed = seeds, class_samples, seed
        self.drawing = {
            "sampler": sampler,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "batch_size": batch_size,
            "precision": precision,
        }
        self.judge = Judge.from_file(judge_file or SHIPPED)

    def read(self, images: Sequence[Image.Image]) -> Reading:
        return self.judge.read(self._pixels(images))

    def subject(self, photos: Sequence[Image.Image]) -> Subject:
        """Who is on the photos, by what most of them show."""
        reading = self.read(photos)
        wanted = {name: value for name, value in majority(reading).items() if name in SUBJECT_ATTRIBUTES}
        return Subject(wanted, ceiling=round(float(subject_fidelity(reading, wanted).mean()), 4))

    def measure(self, draw: Text2Image, *, subject: Subject, prompts: Prompts) -> Measured:
        """Draws the subject in every context and the class, and has the judge read them."""
        jobs = [(self.seed + s, context) for s in range(self.seeds) for context in CONTEXTS]
        pictures = self._draw(
            draw, [f"{prompts.subject} {CONTEXTS[context]}" for _, context in jobs], [s for s, _ in jobs]
        )
        reading = self.read(pictures)
        asked = torch.tensor([list(CONTEXTS).index(context) for _, context in jobs])
        seeds = [self.seed + i for i in range(self.class_samples)]
        of_class = self._pixels(self._draw(draw, [prompts.of_class] * self.class_samples, seeds))
        return Measured(
            fidelity=subject_fidelity(reading, subject.attributes).view(self.seeds, -1),
            context=(reading["context"] == asked).float().view(self.seeds, -1),
            carries=carries_subject(self.judge.read(of_class), subject.attributes),
            diversity=diversity(self.judge.features(of_class)),
        )

    def summary(self, after: Measured, base: Measured, subject: Subject) -> Figures:
        """What `metrics.json` holds: the model's figures, with the untouched base's and the photos'."""
        return {
            **after.figures(base),
            "intervals": after.intervals(base),
            "base": base.figures(base),
            "ceiling": {"subject_fidelity": subject.ceiling},
            "judge": self.judge.accuracy,
        }

    def score(self, figures: Mapping[str, float]) -> float:
        """Subject fidelity x prompt fidelity, minus the drift of the class."""
        drift = max(0.0, figures["class_drift"])
        return figures["subject_fidelity"] * figures["prompt_fidelity"] - drift

    def plain(
        self, pictures: Sequence[Picture], *, subject: Subject, prompts: Prompts, of_class: Sequence[Picture]
    ) -> Figures:
        """Figures of pictures that any tool drew; prompt fidelity of those whose prompt names a place."""
        reading = self.read([picture.image for picture in pictures])
        values = {"subject_fidelity": subject_fidelity(reading, subject.attributes)}
        asked = [context_of(picture.prompt) for picture in pictures]
        if placed := [k for k, context in enumerate(asked) if context is not None]:
            wanted = torch.tensor([list(CONTEXTS).index(asked[k]) for k in placed])
            values["prompt_fidelity"] = (reading["context"][placed] == wanted).float()
        figures: Figures = {}
        if len(of_class) > 1:
            of_class_pixels = self._pixels([picture.image for picture in of_class])
            read = self.judge.read(of_class_pixels)
            values["class_carries_subject"] = carries_subject(read, subject.attributes)
            figures["class_diversity"] = round(diversity(self.judge.features(of_class_pixels)), 4)
        figures |= {name: round(float(rows.mean()), 4) for name, rows in values.items()}
        intervals = {name: bootstrap(rows, lambda x: float(x.mean())) for name, rows in values.items()}
        return {**figures, "intervals": intervals, "ceiling": {"subject_fidelity": subject.ceiling}}

    def examine(self, draw: Text2Image, *, samples: int) -> dict[str, float]:
        """A base's own quality: full captions of unseen scenes -> share drawn right, by attribute."""
        scenes = [sample_scene(EXAM * BOOK + k) for k in range(samples)]
        seeds = [self.seed + k for k in range(samples)]
        reading = self.read(self._draw(draw, [full_caption(scene) for scene in scenes], seeds))
        return _right(reading, scenes)

    def _draw(self, draw: Text2Image, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return [sample.image for sample in draw(prompts, seeds=seeds, **self.drawing, progress=True)]

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([to_tensor(fit_image(image.convert("RGB"), SIZE)) for image in images])


def context_of(prompt: str | None) -> str | None:
    """The context that a prompt asks for, if it names one: "a photo of sks dog on the moon" -> "moon"."""
    return next((name for name, phrase in CONTEXTS.items() if phrase in (prompt or "")), None)


def _right(reading: Reading, scenes: Sequence[Scene]) -> dict[str, float]:
    labels = [scene.labels() for scene in scenes]
    shares = {
        name: (seen == torch.tensor([label[name] for label in labels])).float().mean()
        for name, seen in reading.items()
    }
    return {name: round(float(share), 4) for name, share in shares.items()}
