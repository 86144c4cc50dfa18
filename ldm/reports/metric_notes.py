"""What a run page says of each metric and curve: its meaning, a sign of trouble, what to do then."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

UNGUIDED = "_unguided"  # ends the name of a metric that is measured without guidance too


class Measured(NamedTuple):
    """A metric of the trained model, and what to compare it with, where that is known."""

    value: float
    base: float | None = None  # the untouched base's
    photos: float | None = None  # the real photos'
    noise_floor: float | None = None  # of two sets of the base's own images


@dataclass(frozen=True)
class MetricNote:
    """How a metric is shown.

    scale: values at the ends of its gauge. is_trouble: whether the sign of trouble is seen.
    """

    name: str
    unit: str
    meaning: str
    trouble: str
    remedy: str
    scale: tuple[float, float]
    is_trouble: Callable[[Measured], bool]


class CurveNote(NamedTuple):
    """How a curve is shown."""

    name: str
    unit: str
    meaning: str


def measured(metrics: Mapping[str, Any], key: str) -> Measured:
    """A metric of `metrics.json`, with what it is compared with."""
    floor = metrics.get("noise_floor", {}).get(key)
    base = metrics.get("base", {}).get(key) if floor is None else None  # a shift is one from the base
    return Measured(metrics[key], base, metrics.get("ceiling", {}).get(key), floor)


def notes_of(metrics: Mapping[str, Any]) -> dict[str, MetricNote]:
    """The metrics of `metrics.json` that have a card: those known here, then an evaluation's own."""
    own = [key for key in metrics.get("base", {}) if isinstance(metrics.get(key), float)]
    own = [key for key in own if key.removesuffix(UNGUIDED) not in METRICS]
    known = {key: note for key, note in METRICS.items() if key in metrics}
    return known | {key: _own_note(key, metrics[key], metrics["base"][key]) for key in own}


def _own_note(key: str, *values: float) -> MetricNote:
    name, scale = key.replace("_", " ").capitalize(), (min(0.0, *values), max(1.0, *values))
    return MetricNote(name, "", "A metric of this run's own evaluation.", "", "", scale, lambda found: False)


def signs_of_trouble(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The metrics that show their sign of trouble, with or without guidance."""
    for key, note in METRICS.items():
        own = [name for name in (key, key + UNGUIDED) if name in metrics]
        if any(note.is_trouble(measured(metrics, name)) for name in own):
            yield key


def _undertrained(found: Measured) -> bool:
    known = found.base is not None and found.photos is not None
    return known and found.value < (found.base + found.photos) / 2


def _moved(found: Measured) -> bool:
    return found.noise_floor is not None and found.value > 2 * found.noise_floor


def _falls(by: float) -> Callable[[Measured], bool]:
    return lambda found: found.base is not None and found.value < found.base - by


def _rises(by: float) -> Callable[[Measured], bool]:
    return lambda found: found.value > (found.base or 0.0) + by


HALFWAY = "less than halfway from the base to the photos, which is undertrained"
LONGER = "Train for more steps or at a higher learning rate, or give more and clearer photos."
SHORTER = "Train for fewer steps or at a lower learning rate, above all of the text encoder."
KEEP = "Raise the weight of the prior loss or the number of prior images, or train for fewer steps."
MASK = "Mask the photos (model.params.objective.masks), or train for fewer steps."
SHIFT = "Keep data.params.prior_caption_dropout at 0.25, or sample at a lower guidance (docs/guidance.md)."

METRICS = {
    "subject_fidelity": MetricNote(
        "Subject fidelity",
        "share, 0 to 1",
        "Share of the subject's attributes that the judge reads in samples of the subject; 1 is best.",
        HALFWAY,
        LONGER,
        (0, 1),
        _undertrained,
    ),
    "prompt_fidelity": MetricNote(
        "Prompt fidelity",
        "share, 0 to 1",
        "Share of the subject's samples that are in the place that the prompt names; 1 is best.",
        "more than 0.1 below the base's, which is overtrained: the photos' places are learnt too",
        SHORTER,
        (0, 1),
        _falls(0.1),
    ),
    "background_leak": MetricNote(
        "Background leak",
        "share, 0 to 1",
        "Share of the samples asked for places not in the photos that show one of the photos'; 0 is best.",
        "more than 0.1 above the base's: the photos' places are learnt with the subject",
        MASK,
        (0, 1),
        _rises(0.1),
    ),
    "class_drift": MetricNote(
        "Class drift",
        "difference of shares",
        "Rise in the share of samples of the class that show the subject; 0 is best.",
        "above 0.05: the class becomes the subject",
        KEEP,
        (-0.2, 1),
        _rises(0.05),
    ),
    "bleeding": MetricNote(
        "Bleeding",
        "difference of shares",
        "Rise in the share of samples of a subject that show another subject's attributes; 0 is best.",
        "above 0.05: the subjects take on each other's looks",
        "Train for fewer steps, or teach each subject in a run of its own.",
        (-0.2, 1),
        _rises(0.05),
    ),
    "diversity_ratio": MetricNote(
        "Diversity",
        "ratio to the base",
        "How much samples of the class differ from each other, relative to the base's; 1 is best.",
        "below 0.9: samples of the class become alike",
        KEEP,
        (0, 1.2),
        lambda found: found.value < 0.9,
    ),
    "class_shift": MetricNote(
        "Class shift",
        "distance, 0 to 1",
        "How far samples of the class have moved in any direction; up to the noise floor is none.",
        "above twice the noise floor",
        SHIFT,
        (0, 1),
        _moved,
    ),
    "class_shift_frechet": MetricNote(
        "Class shift, Fréchet",
        "distance of features",
        "The same as a Fréchet distance of image features; up to the noise floor is none.",
        "above twice the noise floor",
        SHIFT,
        (0, 1),
        _moved,
    ),
    "dino": MetricNote(
        "DINO",
        "cosine",
        "Likeness of samples and photos of the subject in DINO's features; higher is better.",
        HALFWAY,
        LONGER,
        (0, 1),
        _undertrained,
    ),
    "clip_i": MetricNote(
        "CLIP-I",
        "cosine",
        "Likeness of samples and photos of the subject in CLIP's features; higher is better.",
        HALFWAY,
        LONGER,
        (0, 1),
        _undertrained,
    ),
    "clip_t": MetricNote(
        "CLIP-T",
        "cosine",
        "Agreement of samples with their prompts in CLIP's features; higher is better.",
        "more than 0.02 below the base's, which is overtrained: prompts are followed less",
        SHORTER,
        (0, 0.4),
        _falls(0.02),
    ),
    "pres": MetricNote(
        "PRES",
        "cosine",
        "Likeness of samples of the class and photos of the subject in DINO's features; the base's is best.",
        "more than 0.05 above the base's: the class becomes the subject",
        KEEP,
        (0, 1),
        _rises(0.05),
    ),
    "div": MetricNote(
        "DIV",
        "LPIPS",
        "Mean perceptual distance of two samples of one prompt; higher is more diverse.",
        "more than 0.05 below the base's: samples become alike",
        KEEP,
        (0, 1),
        _falls(0.05),
    ),
}

LOSS = "mean squared error"
CURVES = {
    "train/subject_loss": CurveNote(
        "Subject loss",
        LOSS,
        "Of the photos at random noise levels. It is noisy by nature and says little: look at the samples.",
    ),
    "train/prior_loss": CurveNote(
        "Prior loss", LOSS, "Of the prior images. A rise over the whole run means that the class is moving."
    ),
    "val/subject_loss": CurveNote(
        "Subject loss, fixed noise",
        LOSS,
        "At noise that never changes. Flat is usual and does not mean that nothing was learnt.",
    ),
    "val/prior_loss": CurveNote(
        "Prior loss, fixed noise", LOSS, "At noise that never changes. A steady rise: the class is moving."
    ),
    "train/grad_norm": CurveNote(
        "Gradient norm",
        "L2 norm, before clipping",
        "Single peaks are harmless; growth without end calls for a lower learning rate.",
    ),
    "train/images_per_second": CurveNote(
        "Speed", "images per second", "Photos and prior images; it drops while something else is computed."
    ),
}
LEARNING_RATE = CurveNote("Learning rate", "per step", "As the schedule sets it.")


def curve_notes(names: Mapping[str, Any]) -> dict[str, CurveNote]:
    """The curves of a run that are shown, in this order."""
    rates = {
        name: LEARNING_RATE._replace(
            name=f"Learning rate, {name.partition('/')[2] or name}".replace("_", " ")
        )
        for name in names
        if name.startswith("lr")
    }
    return {name: note for name, note in {**CURVES, **rates}.items() if name in names}
