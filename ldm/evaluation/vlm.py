"""A vision-language model as the judge: is it the subject, is it the prompt?

The two questions are those of DreamBench++ (Peng et al. 2024), answered 0 to 4; they are asked in our words,
and read as expected values, so that the numbers are not comparable with that paper's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.annotations import NonNegativeFloat, PositiveInt, Seed
from ldm.data.prompts import read_prompts
from ldm.diffusion.schedule import Spacing
from ldm.errors import UserError
from ldm.evaluation.metrics import bootstrap
from ldm.evaluation.photos import without
from ldm.evaluation.protocol import Better, GeneratedImage, Metrics, SubjectPrompts, settings_of, sides_of
from ldm.evaluation.vision_language import Rater, expected_rating, shared_model
from ldm.pipeline import Text2Image
from ldm.precision import Precision
from ldm.sampler_nodes import SamplerNode

BEST = 4  # rating
SCALE = "Answer with one number: 0 (not at all), 1 (slightly), 2 (partly), 3 (mostly) or 4 (entirely)."
SAME_SUBJECT = (
    "The first image is a photo of a certain {class_word}. Is the {class_word} in the second image the very "
    "same one? Compare shape, colours, material and details such as marks or a face; ignore the pose, the "
    "surroundings, the light and what it wears. " + SCALE
)
SAME_PROMPT = (
    'Does this image show what this text says: "{prompt}"? Consider all that it names, how these relate, '
    "their colours, the place and the style; ignore how beautiful the image is. " + SCALE
)


@dataclass(frozen=True)
class Ratings:
    """Of one model's samples: S independent rows of P; a row is a seed with its prompts, or one image."""

    subject: Tensor  # [S, P] in [0, 4]
    prompt: Tensor | None  # [S, P]

    def values(self) -> dict[str, Tensor]:
        found = {"vlm_subject": self.subject, "vlm_prompt": self.prompt}
        return {name: rows for name, rows in found.items() if rows is not None}

    def metrics(self) -> dict[str, float]:
        return {name: round(float(rows.mean()), 4) for name, rows in self.values().items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        return {name: bootstrap(rows) for name, rows in self.values().items() if len(rows) > 1}


class VlmEvaluation:
    """Evaluation by a vision-language model; by default of the paper's 25 prompts, 4 samples each.

    Args:
        model: folder of an image-text-to-text model in transformers' format, or its name on the hub; None is
            google/gemma-3-12b-it where a GPU has 30 GiB, else HuggingFaceTB/SmolVLM-500M-Instruct.
        prompts: a list in configs/prompts, or a file of one's own.
        seeds: samples of each prompt.
        sampler, steps, guidance_scale: of all samples.
        spacing: of the steps; None: as suits the sampler.
        guidance_base: the base, not the trained model, predicts for the empty prompt.
        seed: of the first sample.
        precision: of the networks while sampling; "auto" is bf16 on a CUDA device and fp32 elsewhere.
        batch_size: samples, and questions, at a time, which decides none of them.
        size: pixels a side, or [height, width]; None is the model's own square.
        device: of the judge; None is the GPU where there is one.
    """

    better: ClassVar[Mapping[str, Better]] = {"vlm_subject": "higher", "vlm_prompt": "higher"}
    class_samples: ClassVar[int] = 0

    def __init__(
        self,
        *,
        model: str | None = None,
        prompts: str = "dreambooth-object",
        seeds: PositiveInt = 4,
        sampler: SamplerNode = "ddim",
        spacing: Spacing | None = None,
        steps: PositiveInt = 50,
        guidance_scale: NonNegativeFloat = 7.5,
        guidance_base: bool = False,
        seed: Seed = 1000,
        batch_size: PositiveInt = 4,
        precision: Precision = "auto",
        size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None,
        device: str | None = None,
    ):
        read_prompts(prompts, identifier="sks", class_word="dog")  # reports a missing file at once
        self.prompts = prompts
        self.seeds = seeds
        self.seed = seed
        self.batch_size = batch_size
        self.guidance_base = guidance_base
        self.sampling = {
            "sampler": sampler,
            "spacing": spacing,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "batch_size": batch_size,
            "precision": precision,
            **sides_of(size),
        }
        self.rater: Rater = shared_model(model, device=device)

    def unfit(self, photos: Sequence[Image.Image], prompts: SubjectPrompts) -> list[str]:
        """It judges any photographs."""
        return []

    def subject(self, photos: Sequence[Image.Image]) -> Sequence[Image.Image]:
        """The photos: sample i is compared with photo i, in turn."""
        if not len(photos):
            raise UserError("There is no photo to compare with", remedy="Give one or more.")
        return photos

    def measure(
        self,
        pipeline: Text2Image,
        *,
        subject: Sequence[Image.Image],
        prompts: SubjectPrompts,
        is_base: bool = False,
    ) -> Ratings:
        """Samples every prompt with every seed, and asks both questions of each sample."""
        texts = read_prompts(self.prompts, **prompts.words)
        jobs = [(self.seed + s, text) for s in range(self.seeds) for text in texts]
        seeds, every = [seed for seed, _ in jobs], [text for _, text in jobs]
        samples = pipeline(every, seeds=seeds, **self.sampling, progress=True)
        images = [GeneratedImage(sample.image, sample.prompt) for sample in samples]
        return self._rate(images, subject, prompts, rows=self.seeds)

    def summary(self, after: Ratings, base: Ratings, subject: Any) -> Metrics:
        """What `metrics.json` holds: the model's ratings, and the untouched base's."""
        return {
            **after.metrics(),
            "intervals": after.intervals(),
            "base": base.metrics(),
            "sampling": settings_of(self),
            "judge": self.rater.name,
        }

    def score(self, metrics: Mapping[str, Any]) -> float:
        """The product of both, in shares of the best rating, as DreamBench++ ranks methods."""
        return metrics["vlm_subject"] * metrics["vlm_prompt"] / BEST**2

    def measure_images(
        self,
        samples: Sequence[GeneratedImage],
        *,
        subject: Sequence[Image.Image],
        prompts: SubjectPrompts,
        of_class: Sequence[GeneratedImage],
    ) -> Metrics:
        """Ratings of images of any tool; of their prompts where these are known."""
        rated = self._rate(samples, subject, prompts, rows=len(samples))
        return {**rated.metrics(), "intervals": rated.intervals(), "judge": self.rater.name}

    def _rate(
        self,
        samples: Sequence[GeneratedImage],
        photos: Sequence[Image.Image],
        prompts: SubjectPrompts,
        *,
        rows: int,
    ) -> Ratings:
        """rows: independent ones among the samples, which are in the order of their rows."""
        question = SAME_SUBJECT.format(class_word=prompts.class_word)
        asked = [(question, (photos[i % len(photos)], sample.image)) for i, sample in enumerate(samples)]
        told = []
        if samples and all(sample.prompt is not None for sample in samples):
            texts = [without(sample.prompt, prompts.identifier) for sample in samples]
            about = zip(texts, samples, strict=True)
            told = [(SAME_PROMPT.format(prompt=text), (sample.image,)) for text, sample in about]
        with self.rater.placed():
            of_prompt = self._ask(told, "is it the prompt?").view(rows, -1) if told else None
            return Ratings(self._ask(asked, "is it the subject?").view(rows, -1), of_prompt)

    def _ask(self, asked: Sequence[tuple[str, Sequence[Image.Image]]], what: str) -> Tensor:
        """Questions with their images -> [N] expected ratings, in batches with a bar."""
        found = []
        with tqdm(total=len(asked), desc=what, unit="image", disable=None) as bar:
            for first in range(0, len(asked), self.batch_size):
                questions, images = zip(*asked[first : first + self.batch_size], strict=True)
                found.append(expected_rating(self.rater.rating_logits(questions, images)))
                bar.update(len(questions))
        return torch.cat(found)
