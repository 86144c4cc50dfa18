"""The buckets that a run's photos are in: whose each optimizer step is, and which images belong to each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

from ldm.data.buckets import Shape, nearest, shares
from ldm.data.images import is_enlarged
from ldm.data.items import VALIDATION_START, BucketStream, ItemStream, SourceImage, StreamName
from ldm.data.streams import StreamPart, Turns, about_cycle, stream_of
from ldm.errors import UserError


class BucketsInUse:
    """The shapes that photos are trained at: each photo at the nearest one.

    A step's bucket is a function of (seed, step): in each cycle a bucket has as many steps as it has photos,
    in a random order. Of several concepts a photo counts as much as the concept's weight gives it, so all
    shares are those without buckets. Validation steps count the held-out photos, where there are some.

    photos: -> the parts of the subject stream, which are read when they are needed. candidates: all shapes
    that there could be; one is the shape of all photos.
    """

    def __init__(self, photos: Callable[[], Sequence[StreamPart]], candidates: Sequence[Shape], *, seed: int):
        self._photos = photos
        self.candidates = tuple(candidates)
        self.seed = seed

    @cached_property
    def parts(self) -> tuple[StreamPart, ...]:
        return tuple(self._photos())

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Those that photos are trained at, the widest first."""
        if len(self.candidates) == 1:
            return self.candidates
        photos = [photo for part in self.parts for photo in part.trained]
        found = {nearest(self.candidates, *photo.upright_size) for photo in photos}
        return tuple(shape for shape in self.candidates if shape in found)

    @property
    def largest(self) -> Shape:
        return max(self.shapes, key=lambda shape: shape.area)

    @property
    def schedule(self) -> Callable[[int], tuple[int, int]] | None:
        """An optimizer step -> its bucket, and how many steps before it were of that; None for one bucket."""
        if len(self.shapes) == 1:
            return None
        training, validation = (
            Turns(about_cycle(self._weights(validation=v)), seed=self.seed, purpose="bucket")
            for v in (False, True)
        )
        return lambda step: (validation if step >= VALIDATION_START else training)(step)

    def shape_of(self, image: SourceImage) -> Shape:
        """The shape that an image is shown in, whether it is trained on, held out or of a class."""
        return nearest(self.shapes, *image.upright_size)

    def of_shape(self, images: Iterable[SourceImage], shape: Shape) -> tuple[SourceImage, ...]:
        """Those of the images that are shown in a shape."""
        return tuple(image for image in images if self.shape_of(image) == shape)

    def enlarges(self, photo: SourceImage) -> bool:
        """Whether a photo has fewer pixels than it is shown with."""
        height, width = photo.upright_size
        return is_enlarged(self.shape_of(photo), width, height)

    def counts(self) -> Mapping[Shape, int]:
        """How many photos are trained on at each shape."""
        trained = [photo for part in self.parts for photo in part.trained]
        return {shape: len(self.of_shape(trained, shape)) for shape in self.shapes}

    def prior_counts(self, total: int) -> Mapping[Shape, int]:
        """How many of a class's generated images are of each shape. Raises UserError if there is none."""
        if len(self.shapes) == 1:
            return {self.shapes[0]: total}
        if total < len(self.shapes):
            what = f"{total} prior images are fewer than the {len(self.shapes)} buckets of the photos"
            raise UserError(what, where="num_priors", remedy="Raise it: each bucket needs one.")
        return dict(zip(self.shapes, shares(total, self._weights()), strict=True))

    def check_class(self, root: str, images: Sequence[SourceImage]) -> None:
        """Raises UserError for given images of a class of which none fits one of the buckets."""
        for shape in self.shapes:
            if not self.of_shape(images, shape):
                what = f"No image of the class is nearest to the photos' bucket of {shape} pixels"
                remedy = "Add one of that shape, let the base generate them, or take `buckets` off."
                raise UserError(what, where=root, remedy=remedy)

    def photo_stream(
        self, name: StreamName, parts: Sequence[StreamPart], **how: Any
    ) -> ItemStream | BucketStream:
        """The stream of the photos. parts: of `photos`, perhaps under other captions. how: of `stream_of`."""
        training = [self._weighed(parts, shape) for shape in self.shapes]
        validation = [self._weighed(parts, shape, validation=True) for shape in self.shapes]
        return self._stream(name, parts, training, validation, **how)

    def class_stream(
        self, name: StreamName, parts: Sequence[StreamPart], **how: Any
    ) -> ItemStream | BucketStream:
        """The stream of images of classes, each of which has its own weight in every bucket."""
        each = [[p._replace(images=self.of_shape(p.images, shape)) for p in parts] for shape in self.shapes]
        return self._stream(name, parts, each, each, **how)

    def _stream(
        self,
        name: StreamName,
        parts: Sequence[StreamPart],
        training: Sequence[Sequence[StreamPart]],
        validation: Sequence[Sequence[StreamPart]],
        **how: Any,
    ) -> ItemStream | BucketStream:
        if len(self.shapes) == 1:
            return stream_of(name, parts, shape=self.shapes[0], **how)

        def of_bucket(shape: Shape, own: Sequence[StreamPart]) -> ItemStream | None:
            label = f"/{shape.height}x{shape.width}"
            return stream_of(name, own, shape=shape, label=label, **how) if own else None

        return BucketStream(
            list(map(of_bucket, self.shapes, training)), list(map(of_bucket, self.shapes, validation))
        )

    def _weighed(
        self, parts: Sequence[StreamPart], shape: Shape, *, validation: bool = False
    ) -> list[StreamPart]:
        """The parts with photos in a bucket, each with the share of its weight that these photos have."""
        found = []
        for part in parts:
            photos = part.validated if validation else part.trained
            own = self.of_shape(photos, shape)
            if own:
                weight = part.weight * Fraction(len(own), len(photos))
                held_out = own if validation and part.held_out else ()
                found.append(part._replace(images=own, held_out=held_out, weight=weight))
        return found

    def _weights(self, *, validation: bool = False) -> list[Fraction]:
        """The weight of each bucket: that of all photos in it."""
        return [
            sum((p.weight for p in self._weighed(self.parts, shape, validation=validation)), Fraction(0))
            for shape in self.shapes
        ]
