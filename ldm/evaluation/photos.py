"""Evaluation on photographs, with the paper's metrics (Ruiz et al. 2023, sections 4.1 and 4.3).

DINO and CLIP-I: mean cosine over all pairs of a sample and a photo of the subject. CLIP-T: mean cosine of a
sample and its prompt, without the identifier. PRES: DINO between samples of the class and the photos of the
subject; it rises where the class turns into the subject. DIV: mean LPIPS of two samples of a prompt.
Beyond the paper: `class_shift_frechet`, the Fréchet distance of DINO's features between the base's images of
the class and the model's, at the guidance scale and without guidance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from ldm.annotations import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed
from ldm.data.prompts import read_prompts
from ldm.diffusion.schedule import Spacing
from ldm.errors import UserError
from ldm.evaluation.features import CLIP, DINO, Clip, Dino, Lpips
from ldm.evaluation.image_folder import by_prompt
from ldm.evaluation.metrics import bootstrap, frechet_distance
from ldm.evaluation.protocol import (
    CLASS_SAMPLINGS,
    OTHER_SEEDS,
    Better,
    GeneratedImage,
    Metrics,
    SubjectPrompts,
    settings_of,
    sides_of,
)
from ldm.pipeline import Text2Image
from ldm.precision import Precision
from ldm.sampler_nodes import SamplerNode


@dataclass(frozen=True)
class Subject:
    """The photos' embeddings, each row of unit norm."""

    dino: Tensor  # [n, D]
    clip: Tensor  # [n, D]


@dataclass(frozen=True)
class Measurement:
    """Of one model's samples: S independent rows of P; a row is a seed with its prompts, or one image."""

    dino: Tensor  # [S, P] mean cosine with the photos
    clip_i: Tensor  # [S, P]
    clip_t: Tensor | None  # [S, P] cosine with the prompt
    pres: Tensor | None  # [N] of samples of the class
    div: Tensor | None  # [prompts] mean distance of two samples
    of_class: Mapping[str, Tensor] = field(default_factory=dict)  # by sampling, [N, D]: DINO's features
    other_seeds: Mapping[str, Tensor] = field(default_factory=dict)  # the base's, for the noise floor

    def values(self) -> dict[str, Tensor]:
        """What was measured, by the name of its metric."""
        names = ("dino", "clip_i", "clip_t", "pres", "div")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def metrics(self) -> dict[str, float]:
        return {name: round(float(rows.mean()), 4) for name, rows in self.values().items()}

    def shift(self, base: "Measurement") -> dict[str, float]:
        """How far the images of the class are from the base's."""
        return _shifts(self.of_class, base.of_class)

    def noise_floor(self) -> dict[str, float]:
        """The shift between two sets of the base's images, which differ in their seeds."""
        return _shifts(self.other_seeds, self.of_class)


def _shifts(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        f"class_shift_frechet{sampling}": round(frechet_distance(features, other[sampling]), 4)
        for sampling, features in one.items()
    }


class PhotoEvaluation:
    """Evaluation of a model of photographs; by default the paper's protocol: 25 prompts, 4 samples each.

    Args:
        prompts: a list in configs/prompts, or a file of one's own.
        seeds: samples of each prompt.
        class_samples: samples of the class, without the identifier; 0 leaves PRES out.
        sampler, steps, guidance_scale: of all samples.
        spacing: of the steps; None: as suits the sampler.
        guidance_base: the base, not the trained model, predicts for the empty prompt.
        seed: of the first sample.
        precision: of the networks while sampling; "auto" is bf16 on a CUDA device and fp32 elsewhere.
        batch_size: samples at a time, which decides none of them.
        size: pixels a side, or [height, width]; None is the model's own square.
        dino, clip: folders of the networks in transformers' format, or names on the hub.
        diversity: measures DIV, which needs the extra `lpips`.
        device: of DINO, CLIP and LPIPS; None is the GPU where there is one.
    """

    better: ClassVar[Mapping[str, Better]] = {
        **dict.fromkeys(("dino", "clip_i", "clip_t", "div"), "higher"),
        "pres": "lower",
        **{f"class_shift_frechet{how}": "lower" for how in CLASS_SAMPLINGS},
    }

    def __init__(
        self,
        *,
        prompts: str = "dreambooth-object",
        seeds: PositiveInt = 4,
        class_samples: NonNegativeInt = 100,
        sampler: SamplerNode = "ddim",
        spacing: Spacing | None = None,
        steps: PositiveInt = 50,
        guidance_scale: NonNegativeFloat = 7.5,
        guidance_base: bool = False,
        seed: Seed = 1000,
        batch_size: PositiveInt = 4,
        precision: Precision = "auto",
        size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None,
        dino: str = DINO,
        clip: str = CLIP,
        diversity: bool = True,
        device: str | None = None,
    ):
        if seeds < 1 + diversity or class_samples < 0:
            remedy = "Take 1 of `seeds` or more, 2 or more for the diversity, and no negative number."
            raise UserError("There is nothing to measure", where="evaluation", remedy=remedy)
        self.prompts, self.seeds, self.class_samples, self.seed = prompts, seeds, class_samples, seed
        read_prompts(prompts, identifier="sks", class_word="dog")  # reports a missing file at once
        self.sampling = {
            "sampler": sampler,
            "spacing": spacing,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "batch_size": batch_size,
            "precision": precision,
            **sides_of(size),
        }
        self.guidance_base = guidance_base
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dino, self.clip = Dino(dino, device=place), Clip(clip, device=place)
        self.lpips = Lpips(device=place) if diversity else None

    def unfit(self, photos: Sequence[Image.Image], prompts: SubjectPrompts) -> list[str]:
        """DINO and CLIP judge any photographs."""
        return []

    def subject(self, photos: Sequence[Image.Image]) -> Subject:
        return Subject(self.dino.embed_images(photos), self.clip.embed_images(photos))

    def measure(
        self, pipeline: Text2Image, *, subject: Subject, prompts: SubjectPrompts, is_base: bool = False
    ) -> Measurement:
        """Samples every prompt with every seed, and the class; of the base also with other seeds."""
        texts = read_prompts(self.prompts, **prompts.words)
        jobs = [(self.seed + s, text) for s in range(self.seeds) for text in texts]
        samples = self._generate(pipeline, [text for _, text in jobs], [seed for seed, _ in jobs])
        of_class = self._of_class(pipeline, prompts, first_seed=self.seed)
        measured = self._measure_samples(
            samples, of_class=of_class[""], subject=subject, identifier=prompts.identifier, rows=self.seeds
        )
        if self.class_samples < 2:  # no covariance
            return measured
        other = self._of_class(pipeline, prompts, first_seed=self.seed + OTHER_SEEDS) if is_base else {}
        return replace(measured, of_class=self._features(of_class), other_seeds=self._features(other))

    def _of_class(
        self, pipeline: Text2Image, prompts: SubjectPrompts, *, first_seed: int
    ) -> dict[str, list[GeneratedImage]]:
        """Images of the class with guidance, and without."""
        seeds = range(first_seed, first_seed + self.class_samples)
        return {
            name: self._generate(pipeline, [prompts.of_class] * len(seeds), seeds, **how)
            for name, how in CLASS_SAMPLINGS.items()
        }

    def _features(self, images: Mapping[str, Sequence[GeneratedImage]]) -> dict[str, Tensor]:
        return {name: self.dino.embed_images([p.image for p in group]) for name, group in images.items()}

    def summary(self, after: Measurement, base: Measurement, subject: Subject) -> Metrics:
        """What `metrics.json` holds: the model's metrics, with the untouched base's and the photos'."""
        own = {"dino": subject.dino, "clip_i": subject.clip}
        return {
            **after.metrics(),
            **after.shift(base),
            "intervals": _intervals(after),
            "base": base.metrics(),
            "noise_floor": base.noise_floor(),
            "sampling": settings_of(self),
            "ceiling": {k: round(mean_of_pairs(rows), 4) for k, rows in own.items() if len(rows) > 1},
        }

    def score(self, metrics: Mapping[str, float]) -> float:
        """DINO x CLIP-T, in shares of the base's CLIP-T, minus what the class has lost.

        That is the rise of PRES over the base's, or the shift of the class in any direction if that is more.
        """
        base, shift = metrics["base"], metrics.get("class_shift_frechet", 0.0)
        drift = metrics.get("pres", 0.0) - base.get("pres", 0.0)
        return metrics["dino"] * metrics["clip_t"] / base["clip_t"] - max(0.0, drift, shift)

    def measure_images(
        self,
        samples: Sequence[GeneratedImage],
        *,
        subject: Subject,
        prompts: SubjectPrompts,
        of_class: Sequence[GeneratedImage],
    ) -> Metrics:
        """Metrics of images of any tool: CLIP-T and DIV where their prompts are known."""
        measured = self._measure_samples(
            samples,
            of_class=of_class,
            subject=subject,
            identifier=prompts.identifier,
            rows=len(samples),
        )
        return {**measured.metrics(), "intervals": _intervals(measured)}

    def _measure_samples(
        self,
        samples: Sequence[GeneratedImage],
        *,
        of_class: Sequence[GeneratedImage],
        subject: Subject,
        identifier: str,
        rows: int,
    ) -> Measurement:
        images, groups = [sample.image for sample in samples], by_prompt(samples)
        dino, clip = self.dino.embed_images(images), self.clip.embed_images(images)
        clip_t = div = pres = None
        if groups:
            texts = [without(sample.prompt, identifier) for sample in samples]
            unique = list(dict.fromkeys(texts))
            named = dict(zip(unique, self.clip.embed_texts(unique), strict=True))
            clip_t = (clip * torch.stack([named[text] for text in texts])).sum(1).view(rows, -1)
        if self.lpips is not None:
            div = diversity(groups, self.lpips)
        if of_class:
            pres = (self.dino.embed_images([p.image for p in of_class]) @ subject.dino.T).mean(1)
        return Measurement(
            dino=(dino @ subject.dino.T).mean(1).view(rows, -1),
            clip_i=(clip @ subject.clip.T).mean(1).view(rows, -1),
            clip_t=clip_t,
            pres=pres,
            div=div,
        )

    def _generate(
        self, pipeline: Text2Image, prompts: Sequence[str], seeds: Sequence[int], **how: float
    ) -> list[GeneratedImage]:
        samples = pipeline(prompts, seeds=seeds, **self.sampling | how, progress=True) if prompts else []
        return [GeneratedImage(sample.image, sample.prompt) for sample in samples]


def mean_of_pairs(rows: Tensor) -> float:
    """Mean cosine of two different rows. rows: [n, D] of unit norm, n >= 2."""
    n = len(rows)
    return float(((rows @ rows.T).sum() - rows.square().sum()) / (n * (n - 1)))


def diversity(groups: Mapping[str, Sequence[Image.Image]], distance: Lpips) -> Tensor | None:
    """Mean distance of two images of one size, for each prompt that has two -> [prompts]; None: none has."""
    two = [combinations(images, 2) for images in groups.values()]
    alike = [[(one, other) for one, other in pairs if one.size == other.size] for pairs in two]
    if not (pairs := [group for group in alike if group]):
        return None
    distances = distance([pair for group in pairs for pair in group])
    return torch.stack([part.mean() for part in distances.split([len(group) for group in pairs])])


def without(prompt: str, identifier: str) -> str:
    """The prompt without the identifier, which CLIP does not know: "a sks dog" -> "a dog"."""
    return " ".join(word for word in prompt.split() if word.lower() != identifier.lower())


def _intervals(measured: Measurement) -> dict[str, tuple[float, float]]:
    return {name: bootstrap(rows) for name, rows in measured.values().items() if len(rows) > 1}
