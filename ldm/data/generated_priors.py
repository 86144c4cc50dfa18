"""A run's generated prior images: of each class a set for every bucket of its photos."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from torch import Tensor

from ldm.data.buckets import Shape
from ldm.data.captions import Captions
from ldm.data.concepts import PriorClass
from ldm.data.items import ItemStream, SourceImage, TrainingView
from ldm.data.latents import point_posterior
from ldm.data.priors import PriorGenerators, PriorSet
from ldm.data.streams import MixedStream
from ldm.errors import UserError


class GeneratedPriors:
    """Images, latents and, while a run trains, new images of the sets.

    classes: those whose images are generated. counts: shape -> images of each class. generate: generates more
    images of a set.
    """

    def __init__(
        self,
        sets: Sequence[PriorSet],
        classes: Sequence[PriorClass],
        counts: Mapping[Shape, int],
        *,
        generate: PriorGenerators | None = None,
    ):
        self.sets = tuple(sets)
        self.classes = tuple(classes)
        self.counts = dict(counts)
        self.generate = generate

    def images(self, known: PriorClass) -> tuple[SourceImage, ...]:
        """Those of a class, of one shape after the other. Raises UserError if some are missing."""
        return tuple(
            image
            for shape, count in self.counts.items()
            for image in generated_images(set_of(self.sets, known, shape=shape), count)
        )

    def latent_stats(
        self, images: Callable[[PriorClass], Sequence[SourceImage]], *, seed: int
    ) -> dict[str, Tensor]:
        """Key of each image's view -> the sampler's latents as latent stats, with std 0.

        images: as `images` gives them, perhaps kept. seed: of the run.
        """
        found = {}
        for known in self.classes:
            following = iter(images(known))
            for shape, count in self.counts.items():
                priors = set_of(self.sets, known, shape=shape)
                for i, image in enumerate(islice(following, count)):
                    view = TrainingView(image, shape, None, False, seed)
                    found[view.key] = point_posterior(priors.latents(i))
        return found

    def online(self, items: Sequence[tuple[ItemStream, int]]) -> list[Tensor]:
        """Latent stats of prior items, from images after those of `counts`, a new one for each item.

        items: streams, each with the number of an item.
        """
        found: dict[int, Tensor] = {}
        turns = [s.turns(number) if isinstance(s, MixedStream) else (0, number) for s, number in items]
        sets = [(which, stream.shape) for (which, _), (stream, _) in zip(turns, items, strict=True)]
        for which, shape in sorted(set(sets)):
            own = [row for row, of_set in enumerate(sets) if of_set == (which, shape)]
            priors = set_of(self.sets, self.classes[which], shape=shape)
            numbers = [self.counts[shape] + turns[row][1] for row in own]
            found |= zip(own, priors.generate_now(numbers, self.generate(priors.spec)), strict=True)
        return [point_posterior(found[row]) for row in range(len(items))]


def set_of(sets: Sequence[PriorSet], known: PriorClass, *, shape: Shape) -> PriorSet:
    """The generated set of a class. Raises ValueError if there is none, or one of another prompt or shape."""
    if not sets:
        raise ValueError("prior images have to be generated and attached before setup")
    for priors in sets:
        if (priors.spec.prompt, priors.spec.shape) == (known.prompt, shape):
            return priors
    spec = sets[0].spec
    raise ValueError(f"the prior images were generated for {spec.prompt!r} at {spec.shape} pixels")


def generated_images(priors: PriorSet, count: int) -> tuple[SourceImage, ...]:
    """The first `count` images of a set. Raises UserError if some are missing."""
    images = priors.images(count)
    if len(images) < count:
        what = f"{count - len(images)} of {count} prior images are missing"
        raise UserError(what, where=priors.folder, remedy="Run scripts/generate_priors.py.")
    captions = Captions((priors.spec.prompt,))
    return tuple(SourceImage(priors.image_path(i), image.sha256, captions) for i, image in images.items())
