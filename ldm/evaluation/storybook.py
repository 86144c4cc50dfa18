"""Evaluation on the storybook, by the judge: fidelity to subject and prompt, background leak, drift and shift
of the class."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from PIL import Image
from torch import Tensor

from ldm.annotations import NonNegativeFloat, PositiveInt, Seed
from ldm.diffusion.schedule import Spacing
from ldm.errors import UserError
from ldm.evaluation.bleeding import bleeding_of, matrix_of
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
from ldm.evaluation.protocol import (
    CLASS_SAMPLINGS,
    OTHER_SEEDS,
    Better,
    GeneratedImage,
    Metrics,
    SubjectPrompts,
    settings_of,
)
from ldm.evaluation.storybook_limits import pixels_of, reasons_against
from ldm.pipeline import Text2Image
from ldm.precision import Precision
from ldm.sampler_nodes import SamplerNode
from ldm.storybook.dataset import SCENES_PER_SEED
from ldm.storybook.judge import SHIPPED, Judge
from ldm.storybook.world import CONTEXTS, SUBJECT_ATTRIBUTES, Scene, full_caption, sample_scene

HELD_OUT_SEED = 999  # of the scenes that a base is evaluated on; no training uses them


@dataclass(frozen=True)
class Subject:
    """The subject of the photos: its attributes, the share of them that the judge reads per photo, and the
    places that it reads on any of them, as indices into `CONTEXTS`."""

    attributes: Mapping[str, int]
    ceiling: float
    places: Collection[int] = ()


@dataclass(frozen=True)
class ClassImages:
    """The judge's readings and features of N samples of the class."""

    reading: Reading  # attribute -> [N]
    features: Tensor  # [N, D] of unit norm

    def shift(self, other: "ClassImages", *, suffix: str = "") -> dict[str, float]:
        """Class shift: mean total variation of the attributes, and Fréchet distance of the features."""
        return {
            f"class_shift{suffix}": mean(total_variation(self.reading, other.reading).values()),
            f"class_shift_frechet{suffix}": frechet_distance(self.features, other.features),
        }


@dataclass(frozen=True)
class Measurement:
    """The judge's readings of one model's samples: S seeds, C contexts, N samples of the class."""

    reading: Reading  # of the subject's samples, attribute -> [S * C]
    fidelity: Tensor  # [S, C] share of the subject's attributes
    context: Tensor  # [S, C] 1 where the context is that of the prompt
    carries: Tensor  # [N] 1 where a sample of the class shows the subject
    of_class: Mapping[str, ClassImages]  # by sampling: "" with guidance, "_unguided" without
    other_seeds: Mapping[str, ClassImages] | None = None  # the base's, for the noise floor of the shift
    leaks: Tensor | None = None  # [S, U] 1 where one of the photos' places is seen, asked for U other ones

    def metrics(self, base: "Measurement") -> dict[str, float]:
        """The headline metrics, those of the class relative to the base's."""
        metrics = {
            "subject_fidelity": self.fidelity.mean(),
            "prompt_fidelity": self.context.mean(),
            "class_drift": self.carries.mean() - base.carries.mean(),
            "diversity_ratio": diversity(self.of_class[""].features) / diversity(base.of_class[""].features),
            **_shifts(self.of_class, base.of_class),
        }
        if self.leaks is not None:
            metrics["background_leak"] = self.leaks.mean()
        return {name: round(float(value), 4) for name, value in metrics.items()}

    def noise_floor(self) -> dict[str, float]:
        """`class_shift` between two sets of the same model's samples, which differ in their seeds alone."""
        if self.other_seeds is None:
            return {}
        floors = _shifts(self.other_seeds, self.of_class)
        return {name: round(value, 4) for name, value in floors.items()}

    def intervals(self, base: "Measurement") -> dict[str, Interval]:
        """95 % intervals over seeds; both models' samples of the class have the same seeds: they are paired.

        One seed has none; diversity and shift have none: a resample repeats samples, which biases distances.
        """
        rows = {
            "subject_fidelity": self.fidelity,
            "prompt_fidelity": self.context,
            "class_drift": self.carries - base.carries,
        }
        rows |= {} if self.leaks is None else {"background_leak": self.leaks}
        return _intervals(rows)


def _intervals(values: Mapping[str, Tensor]) -> dict[str, Interval]:
    return {name: bootstrap(rows) for name, rows in values.items() if len(rows) > 1}


def _shifts(one: Mapping[str, ClassImages], other: Mapping[str, ClassImages]) -> dict[str, float]:
    return {
        k: v for sampling in one for k, v in one[sampling].shift(other[sampling], suffix=sampling).items()
    }


class StorybookEvaluation:
    """Evaluation of a storybook model: which samples are generated, and which judge reads them.

    Args:
        seeds: samples of the subject in each of the 8 contexts.
        class_samples: samples of the class, without the identifier.
        sampler, steps, guidance_scale: of all samples.
        spacing: of the steps; None: as suits the sampler.
        guidance_base: the base, not the trained model, predicts for the empty prompt.
        seed: of the first sample.
        precision: of the networks while sampling; "auto" is bf16 on a CUDA device and fp32 elsewhere.
        batch_size: samples at a time, which decides none of them.
        judge_file: the judge's weights; None takes the shipped ones.
    """

    better: ClassVar[Mapping[str, Better]] = {
        **dict.fromkeys(("subject_fidelity", "prompt_fidelity", "diversity_ratio"), "higher"),
        **dict.fromkeys(("class_drift", "background_leak", "bleeding"), "lower"),
        **{
            f"{name}{how}": "lower"
            for name in ("class_shift", "class_shift_frechet")
            for how in CLASS_SAMPLINGS
        },
    }

    def __init__(
        self,
        *,
        seeds: PositiveInt = 4,
        class_samples: Annotated[int, Ge(2)] = 64,
        sampler: SamplerNode = "ddim",
        spacing: Spacing | None = None,
        steps: PositiveInt = 25,
        guidance_scale: NonNegativeFloat = 4.0,
        guidance_base: bool = False,
        seed: Seed = 1000,
        batch_size: PositiveInt = 16,
        precision: Precision = "auto",
        judge_file: str | None = None,
    ):
        if seeds < 1 or class_samples < 2:
            remedy = "Take at least 1 of `seeds` and 2 of `class_samples`."
            raise UserError("There is nothing to measure", where="evaluation", remedy=remedy)
        self.seeds, self.class_samples, self.seed = seeds, class_samples, seed
        self.sampling = {
            "sampler": sampler,
            "spacing": spacing,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "batch_size": batch_size,
            "precision": precision,
        }
        self.guidance_base = guidance_base
        self.judge = Judge.from_file(judge_file or SHIPPED)

    def read(self, images: Sequence[Image.Image]) -> Reading:
        return self.judge.read(pixels_of(images))

    def unfit(self, photos: Sequence[Image.Image], prompts: SubjectPrompts) -> list[str]:
        """Reasons against judging: photos that the storybook did not draw, a class that it does not know."""
        return reasons_against(photos, prompts.class_word, self.judge)

    def subject(self, photos: Sequence[Image.Image]) -> Subject:
        """The subject of the photos, by the majority of their readings."""
        reading = self.read(photos)
        wanted = {name: value for name, value in majority(reading).items() if name in SUBJECT_ATTRIBUTES}
        ceiling = round(float(subject_fidelity(reading, wanted).mean()), 4)
        return Subject(wanted, ceiling, places=frozenset(reading["context"].tolist()))

    def measure(
        self, pipeline: Text2Image, *, subject: Subject, prompts: SubjectPrompts, is_base: bool = False
    ) -> Measurement:
        """Samples the subject in every context and the class, and has the judge read them.

        The class is sampled at the guidance scale and at 1, where the empty prompt has no effect. Of the base
        it is sampled once more, with other seeds.
        """
        jobs = [(self.seed + s, context) for s in range(self.seeds) for context in CONTEXTS]
        samples = self._generate(
            pipeline, [f"{prompts.subject} {CONTEXTS[context]}" for _, context in jobs], [s for s, _ in jobs]
        )
        reading = self.read(samples)
        asked = torch.tensor([list(CONTEXTS).index(context) for _, context in jobs])
        elsewhere = [place for place in range(len(CONTEXTS)) if place not in subject.places]
        leaks = leaked(reading, subject.places).view(self.seeds, -1)[:, elsewhere]
        of_class = self._of_class(pipeline, prompts, first_seed=self.seed)
        other = self._of_class(pipeline, prompts, first_seed=self.seed + OTHER_SEEDS) if is_base else None
        return Measurement(
            reading=reading,
            fidelity=subject_fidelity(reading, subject.attributes).view(self.seeds, -1),
            context=(reading["context"] == asked).float().view(self.seeds, -1),
            carries=carries_subject(of_class[""].reading, subject.attributes),
            of_class=of_class,
            other_seeds=other,
            leaks=leaks if subject.places and elsewhere else None,
        )

    def _of_class(
        self, pipeline: Text2Image, prompts: SubjectPrompts, *, first_seed: int
    ) -> dict[str, ClassImages]:
        """Images of the class with guidance, and without."""
        seeds = range(first_seed, first_seed + self.class_samples)
        found = {}
        for sampling, how in CLASS_SAMPLINGS.items():
            pixels = pixels_of(self._generate(pipeline, [prompts.of_class] * len(seeds), seeds, **how))
            found[sampling] = ClassImages(self.judge.read(pixels), self.judge.features(pixels))
        return found

    def summary(self, after: Measurement, base: Measurement, subject: Subject) -> Metrics:
        """What `metrics.json` holds: the model's metrics, with the untouched base's and the photos'."""
        return {
            **after.metrics(base),
            "intervals": after.intervals(base),
            "base": base.metrics(base),
            "noise_floor": base.noise_floor(),
            "sampling": settings_of(self),
            "ceiling": {"subject_fidelity": subject.ceiling},
            "judge": self.judge.accuracy,
        }

    def bleeding(
        self,
        after: Mapping[str, Measurement],
        base: Mapping[str, Measurement],
        *,
        subjects: Mapping[str, Subject],
        class_words: Mapping[str, str],
    ) -> Metrics:
        """Which subject's attributes are drawn when another is asked for, or a class; all by subject's name.

        -> {"bleeding": name -> rise over the base, "bleeding_matrix": {"trained", "base"}: asked -> drawn}.
        """
        wanted = {name: subject.attributes for name, subject in subjects.items()}

        def matrix(measured: Mapping[str, Measurement]) -> dict[str, dict[str, float]]:
            of_class = {class_words[name]: found.of_class[""].reading for name, found in measured.items()}
            return matrix_of({name: found.reading for name, found in measured.items()}, of_class, wanted)

        matrices = {"trained": matrix(after), "base": matrix(base)}
        return {"bleeding": bleeding_of(**matrices, names=list(wanted)), "bleeding_matrix": matrices}

    def score(self, metrics: Mapping[str, float]) -> float:
        """Subject fidelity x prompt fidelity, minus what the class has lost.

        That is its drift to the subject, or its shift in any direction if that is more.
        """
        lost = max(0.0, metrics["class_drift"], metrics["class_shift"])
        return metrics["subject_fidelity"] * metrics["prompt_fidelity"] - lost

    def measure_images(
        self,
        samples: Sequence[GeneratedImage],
        *,
        subject: Subject,
        prompts: SubjectPrompts,
        of_class: Sequence[GeneratedImage],
    ) -> Metrics:
        """Metrics of images of any tool; prompt fidelity of those whose prompt names a context."""
        reading = self.read([sample.image for sample in samples])
        values = {"subject_fidelity": subject_fidelity(reading, subject.attributes)}
        asked = [context_of(sample.prompt) for sample in samples]
        if placed := [k for k, context in enumerate(asked) if context is not None]:
            wanted = torch.tensor([list(CONTEXTS).index(asked[k]) for k in placed])
            values["prompt_fidelity"] = (reading["context"][placed] == wanted).float()
            other = [
                k for k, place in zip(placed, wanted.tolist(), strict=True) if place not in subject.places
            ]
            if other and subject.places:
                values["background_leak"] = leaked(reading, subject.places)[other]
        metrics: Metrics = {}
        if len(of_class) > 1:
            of_class_pixels = pixels_of([sample.image for sample in of_class])
            read = self.judge.read(of_class_pixels)
            values["class_carries_subject"] = carries_subject(read, subject.attributes)
            metrics["class_diversity"] = round(diversity(self.judge.features(of_class_pixels)), 4)
        metrics |= {name: round(float(rows.mean()), 4) for name, rows in values.items()}
        return {**metrics, "intervals": _intervals(values), "ceiling": {"subject_fidelity": subject.ceiling}}

    def examine(self, pipeline: Text2Image, *, samples: int) -> dict[str, float]:
        """Quality of a base: samples of full captions of unseen scenes -> accuracy, by attribute."""
        scenes = [sample_scene(HELD_OUT_SEED * SCENES_PER_SEED + k) for k in range(samples)]
        seeds = [self.seed + k for k in range(samples)]
        reading = self.read(self._generate(pipeline, [full_caption(scene) for scene in scenes], seeds))
        return accuracy(reading, scenes)

    def _generate(
        self, pipeline: Text2Image, prompts: Sequence[str], seeds: Sequence[int], **how: float
    ) -> list[Image.Image]:
        samples = pipeline(prompts, seeds=seeds, **self.sampling | how, progress=True)
        return [sample.image for sample in samples]


def leaked(reading: Reading, places: Collection[int]) -> Tensor:
    """1 where an image shows one of the photos' places, else 0 -> [N] float32.

    Among images of other places, its mean is the background leak. The untouched base's is the judge's error.
    """
    return torch.isin(reading["context"], torch.tensor(sorted(places), dtype=torch.int64)).float()


def context_of(prompt: str | None) -> str | None:
    """The context that a prompt asks for, if it names one: "a photo of sks dog on the moon" -> "moon"."""
    return next((name for name, phrase in CONTEXTS.items() if phrase in (prompt or "")), None)


def accuracy(reading: Reading, scenes: Sequence[Scene]) -> dict[str, float]:
    """Attribute -> share of the scenes' images in which it is read. reading: attribute -> [N]."""
    labels = [scene.labels() for scene in scenes]
    shares = {
        name: (seen == torch.tensor([label[name] for label in labels])).float().mean()
        for name, seen in reading.items()
    }
    return {name: round(float(share), 4) for name, share in shares.items()}
