"""Prior images: pictures of the class that the base model drew, kept with their latents.

A set lives in a folder named by everything that decides its pictures, so a changed prompt, base or
sampler is a new set. Image i is two files: NNNN.png, then NNNN.safetensors with the latents straight
from the sampler and, as the mark that the image is complete, the seed and checksums. Only these files
decide what is missing, so ranks write side by side without talking, and a run killed at any moment
is taken up where it stood. manifest.json lists them for readers and is rebuilt from them.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from ldm.data.latents import load_latents, require_finite, save_latents
from ldm.errors import UserError
from ldm.files import atomic_write, file_sha256

# seeds -> (picture, scaled latents [z, h, w]) each; the same seed gives the same picture in any batch
Draw = Callable[[list[int]], Sequence[tuple[Image.Image, Tensor]]]


@dataclass(frozen=True)
class PriorSpec:
    """Everything that decides the pictures of a set. Image i is drawn from seed + i."""

    prompt: str
    base_sha256: str  # of the base model's file
    sampler: str
    steps: int
    guidance_scale: float
    negative_prompt: str
    size: int  # pixels a side
    seed: int
    eta: float = 0.0
    precision: str = "fp32"  # of the networks: see `ldm.precision`

    @property
    def hash(self) -> str:
        """12 hex digits of the canonical JSON; 7 and 7.0 are the same scale, and fp32 is not said."""
        numbers = {"guidance_scale": float(self.guidance_scale), "eta": float(self.eta)}
        said = asdict(self) | numbers
        if self.precision == "fp32":
            del said["precision"]
        text = json.dumps(said, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class PriorImage:
    """A complete image of a set."""

    file: str
    seed: int
    sha256: str  # of the picture file


Writes = dict[int, Future[PriorImage]]  # number -> its files, in the making


class PriorSet:
    """The prior images of one spec under `root`; numbered from 0, and any number of them can be added."""

    def __init__(self, root: str | Path, spec: PriorSpec):
        slug = re.sub(r"[^a-z0-9]+", "-", spec.prompt.lower())[:40].strip("-") or "prior"
        self.spec = spec
        self.folder = Path(root) / f"{slug}-{spec.hash}"

    def images(self, count: int) -> dict[int, PriorImage]:
        """Those of the first `count` images that are complete, by number; every checksum is verified."""
        found = {i: self._read(i) for i in range(count)}
        return {i: image for i, image in found.items() if image is not None}

    def missing(self, count: int) -> list[int]:
        """Numbers below `count` whose image is absent or damaged."""
        present = self.images(count)
        return [i for i in range(count) if i not in present]

    def picture(self, index: int) -> Path:
        return self.folder / f"{index:04d}.png"

    def latents(self, index: int) -> Tensor:
        """Scaled latents [z, h, w] float32 of a complete image, straight from the sampler."""
        kept = load_latents(self._latents_file(index))
        if kept is None:
            remedy = "Run again: what is missing is drawn anew."
            raise UserError("The latents are damaged", where=self._latents_file(index), remedy=remedy)
        return kept[0]

    def generate_missing(
        self,
        count: int,
        draw: Draw,
        *,
        batch_size: int,
        progress: Callable[[int], object] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[int]:
        """Draws those of the first `count` images that are missing and returns their numbers.

        Rank r of a `world_size` draws the numbers that leave the remainder r, and rank 0 keeps the
        manifest; after several ranks are done, one calls `write_manifest`. `progress(n)` hears of n more.
        """
        self._make_folder()
        present = self.images(count)
        wanted = [i for i in range(rank, count, world_size) if i not in present]

        def written(batch: Writes) -> None:
            present.update({i: image.result() for i, image in batch.items()})
            if rank == 0:
                self._write_manifest(present)
            if progress:
                progress(len(batch))

        self._draw_and_write(wanted, draw, batch_size=batch_size, written=written)
        if rank == 0 and not wanted:
            self._write_manifest(present)
        return wanted

    def _draw_and_write(
        self, numbers: Sequence[int], draw: Draw, *, batch_size: int, written: Callable[[Writes], None]
    ) -> None:
        """Draws these images while a thread writes those of the batch before; `written` waits for a batch.

        Of what is drawn nothing is lost when drawing fails; what cannot be written ends the drawing.
        """
        pending: Writes = {}
        with ThreadPoolExecutor(1, thread_name_prefix="prior-images") as writer:
            try:
                for first in range(0, len(numbers), batch_size):
                    batch = numbers[first : first + batch_size]
                    drawn = draw([self.spec.seed + i for i in batch])
                    before, pending = pending, {}
                    if before:
                        written(before)
                    for i, (picture, latents) in zip(batch, drawn, strict=True):
                        self._require_finite(i, latents)
                        pending[i] = writer.submit(self._write, i, picture, latents)
            finally:
                if pending:
                    written(pending)

    def drawn_now(self, numbers: Sequence[int], draw: Draw) -> list[Tensor]:
        """Latents of these images, which are drawn together unless all of them are there."""
        if any(self._read(number) is None for number in numbers):
            self._make_folder()
            drawn = draw([self.spec.seed + number for number in numbers])
            for number, (picture, latents) in zip(numbers, drawn, strict=True):
                self._require_finite(number, latents)
                self._write(number, picture, latents)
        return [self.latents(number) for number in numbers]

    def write_manifest(self, count: int) -> None:
        """Rebuilds manifest.json from the complete images among the first `count`."""
        self._make_folder()
        self._write_manifest(self.images(count))

    def _read(self, index: int) -> PriorImage | None:
        kept, picture = load_latents(self._latents_file(index)), self.picture(index)
        if kept is None or kept[1].get("spec") != self.spec.hash or not picture.is_file():
            return None
        image = PriorImage(picture.name, int(kept[1]["seed"]), kept[1]["picture_sha256"])
        whole = image.seed == self.spec.seed + index and image.sha256 == file_sha256(picture)
        return image if whole else None

    def _write(self, index: int, picture: Image.Image, latents: Tensor) -> PriorImage:
        """The picture first, then the latents: an interrupted pair is missing, never half right."""
        path, seed, encoded = self.picture(index), self.spec.seed + index, io.BytesIO()
        picture.save(encoded, format="PNG")
        with atomic_write(path) as temporary:
            temporary.write_bytes(encoded.getbuffer())
        image = PriorImage(path.name, seed, hashlib.sha256(encoded.getbuffer()).hexdigest())
        metadata = {"spec": self.spec.hash, "seed": str(seed), "picture_sha256": image.sha256}
        save_latents(self._latents_file(index), latents, metadata=metadata)
        return image

    def _require_finite(self, index: int, latents: Tensor) -> None:
        require_finite(latents, where=f"prior image {index}, seed {self.spec.seed + index}")

    def _write_manifest(self, present: dict[int, PriorImage]) -> None:
        images = [asdict(present[i]) for i in sorted(present)]
        with atomic_write(self.folder / "manifest.json") as temporary:
            temporary.write_text(json.dumps({"spec": asdict(self.spec), "images": images}, indent=2) + "\n")

    def _latents_file(self, index: int) -> Path:
        return self.folder / f"{index:04d}.safetensors"

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            remedy = "Choose another folder for prior images."
            raise UserError(
                f"The folder cannot be made: {error}", where=self.folder, remedy=remedy
            ) from error
