"""A model on the storybook, scored by the judge: the subject, the prompt, the class, all in seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

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
    frechet_distance,
    majority,
    subject_fidelity,
    total_variation,
)
from ldm.evaluation.protocol import OTHER_SEEDS, Figures, Picture, Prompts
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
class ClassImages:
    """What the judge saw in N images of the class."""

    reading: Reading  # attribute -> [N]
    features: Tensor  # [N, D] of unit norm

    def shift(self, other: "ClassImages", *, suffix: str = "") -> dict[str, float]:
        """How far the two are apart: in the mean over the judge's attributes, and in its features."""
        return {
            f"class_shift{suffix}": mean(total_variation(self.reading, other.reading).values()),
            f"class_shift_frechet{suffix}": frechet_distance(self.features, other.features),
        }


@dataclass(frozen=True)
class Measured:
    """What the judge saw in one model's images; S seeds, C contexts, N images of the class."""

    fidelity: Tensor  # [S, C] share of the subject's attributes
    context: Tensor  # [S, C] 1 where the place is the one asked for
    carries: Tensor  # [N] 1 where an image of the class is the subject itself
    of_class: Mapping[str, ClassImages]  # by sampling: "" with guidance, "_unguided" without
    other_seeds: Mapping[str, ClassImages] | None = None  # the base's, for the noise floor of the shift

    def metrics(self, base: "Measured") -> dict[str, float]:
        """The headline metrics, those of the class relative to the base's."""
        metrics = {
            "subject_fidelity": self.fidelity.mean(),
            "prompt_fidelity": self.context.mean(),
            "class_drift": self.carries.mean() - base.carries.mean(),
            "diversity_ratio": diversity(self.of_class[""].features) / diversity(base.of_class[""].features),
            **_shifts(self.of_class, base.of_class),
        }
        return {name: round(float(value), 4) for name, value in metrics.items()}

    def noise_floor(self) -> dict[str, float]:
        """`class_shift` between two sets of the same model's images, of other seeds: what chance does."""
        if self.other_seeds is None:
            return {}
        floors = _shifts(self.other_seeds, self.of_class)
        return {name: round(value, 4) for name, value in floors.items()}

    def intervals(self, base: "Measured") -> dict[str, Interval]:
        """95 % intervals over seeds; the class's images of both models share theirs, so they are paired.

        None is given of diversity and shift: a resample repeats images, which biases distances.
        """

        def mean(rows: Tensor) -> float:
            return float(rows.mean())

        return {
            "subject_fidelity": bootstrap(self.fidelity, mean),
            "prompt_fidelity": bootstrap(self.context, mean),
            "class_drift": bootstrap(self.carries - base.carries, mean),
        }


def _shifts(one: Mapping[str, ClassImages], other: Mapping[str, ClassImages]) -> dict[str, float]:
    return {
        k: v for sampling in one for k, v in one[sampling].shift(other[sampling], suffix=sampling).items()
    }


class StorybookEvaluation:
    """How a model is measured: which pictures are drawn, and who reads them.

    Args:
        seeds: pictures of the subject in each of the 8 contexts.
        class_samples: pictures of the class without the identifier.
        guidance_base: whether the base predicts for the empty prompt, in the trained model's place.
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
        guidance_base: bool = False,
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
        self.guidance_base = guidance_base
        self.judge = Judge.from_file(judge_file or SHIPPED)

    def read(self, images: Sequence[Image.Image]) -> Reading:
        return self.judge.read(self._pixels(images))

    def subject(self, photos: Sequence[Image.Image]) -> Subject:
        """Who is on the photos, by what most of them show."""
        reading = self.read(photos)
        wanted = {name: value for name, value in majority(reading).items() if name in SUBJECT_ATTRIBUTES}
        return Subject(wanted, ceiling=round(float(subject_fidelity(reading, wanted).mean()), 4))

    def measure(
        self, draw: Text2Image, *, subject: Subject, prompts: Prompts, is_base: bool = False
    ) -> Measured:
        """Draws the subject in every context and the class, and has the judge read them.

        The class is drawn at the guidance scale and at 1, where the empty prompt plays no part. Of the base
        it is drawn once more, with other seeds.
        """
        jobs = [(self.seed + s, context) for s in range(self.seeds) for context in CONTEXTS]
        pictures = self._draw(
            draw, [f"{prompts.subject} {CONTEXTS[context]}" for _, context in jobs], [s for s, _ in jobs]
        )
        reading = self.read(pictures)
        asked = torch.tensor([list(CONTEXTS).index(context) for _, context in jobs])
        of_class = self._of_class(draw, prompts, first_seed=self.seed)
        other = self._of_class(draw, prompts, first_seed=self.seed + OTHER_SEEDS) if is_base else None
        return Measured(
            fidelity=subject_fidelity(reading, subject.attributes).view(self.seeds, -1),
            context=(reading["context"] == asked).float().view(self.seeds, -1),
            carries=carries_subject(of_class[""].reading, subject.attributes),
            of_class=of_class,
            other_seeds=other,
        )

    def _of_class(self, draw: Text2Image, prompts: Prompts, *, first_seed: int) -> dict[str, ClassImages]:
        """Images of the class with guidance, and without."""
        seeds = range(first_seed, first_seed + self.class_samples)
        found = {}
        for sampling, how in {"": {}, "_unguided": {"guidance_scale": 1.0}}.items():
            pixels = self._pixels(self._draw(draw, [prompts.of_class] * len(seeds), seeds, **how))
            found[sampling] = ClassImages(self.judge.read(pixels), self.judge.features(pixels))
        return found

    def summary(self, after: Measured, base: Measured, subject: Subject) -> Figures:
        """What `metrics.json` holds: the model's figures, with the untouched base's and the photos'."""
        return {
            **after.metrics(base),
            "intervals": after.intervals(base),
            "base": base.metrics(base),
            "noise_floor": base.noise_floor(),
            "ceiling": {"subject_fidelity": subject.ceiling},
            "judge": self.judge.accuracy,
        }

    def score(self, figures: Mapping[str, float]) -> float:
        """Subject fidelity x prompt fidelity, minus what the class has lost.

        That is its drift to the subject, or its shift in any direction if that is more.
        """
        lost = max(0.0, figures["class_drift"], figures["class_shift"])
        return figures["subject_fidelity"] * figures["prompt_fidelity"] - lost

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

    def _draw(
        self, draw: Text2Image, prompts: Sequence[str], seeds: Sequence[int], **how: float
    ) -> list[Image.Image]:
        samples = draw(prompts, seeds=seeds, **self.drawing | how, progress=True)
        return [sample.image for sample in samples]

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
