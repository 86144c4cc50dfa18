"""Prior images: samples of the class from the base model, kept with their latents.

The folder of a set is named by a hash of all that determines its images, so another prompt, base, sampler or
shape is another set. Image i is two files: NNNN.png, then NNNN.safetensors with the latents from the sampler,
the seed and checksums. An image is complete if both are valid, so ranks write in parallel without
communication, and a killed run continues where it stopped. manifest.json lists the images and is rebuilt from
these files.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.data.buckets import Shape
from ldm.data.latents import load_latents, require_finite, save_latents
from ldm.errors import UserError
from ldm.files import atomic_write, file_sha256, make_folder, parse_json

# seeds -> (image, scaled latents [z, h, w]) for each; the same seed gives the same image in any batch
GenerateImages = Callable[[list[int]], Sequence[tuple[Image.Image, Tensor]]]


LEFT_OUT = {  # of a name, so that older sets keep theirs
    "precision": "fp32",
    "spacing": None,
    "clip_skip": 1,
    "width": None,
    "levels": None,
    "weights": "float32",
    "padding": None,
}


@dataclass(frozen=True)
class PriorSpec:
    """All that determines the images of a set. Image i has the seed `seed` + i."""

    prompt: str
    base_sha256: str  # of the base model's file
    sampler: str | Mapping[str, Any]  # a short name, or the node of one's own
    steps: int
    guidance_scale: float
    negative_prompt: str | None  # None: zeros, of SDXL
    size: int  # pixels: the height, and without `width` the width too
    seed: int
    eta: float = 0.0
    precision: str = "fp32"  # of the networks: see `ldm.precision`
    spacing: str | None = None  # of the steps; None: as suits the sampler
    clip_skip: int = 1  # of the text encoder
    width: int | None = None  # pixels; None: a square
    levels: str | None = None  # of the noise process at these steps: see `levels_hash`
    weights: str = "float32"  # dtype of UNet and text encoder
    padding: Sequence[int] | None = None  # of prompts: see `padding_of`; None: the family's own

    @property
    def shape(self) -> Shape:
        return Shape(self.size, self.width or self.size)

    @property
    def hash(self) -> str:
        """12 hex digits of the SHA-256 of the canonical JSON; 7 equals 7.0, and what is usual is left out."""
        numbers = {"guidance_scale": float(self.guidance_scale), "eta": float(self.eta)}
        said = asdict(self) | numbers
        for name, usual in LEFT_OUT.items():
            if said[name] == usual:
                del said[name]
        text = json.dumps(said, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


PriorGenerators = Callable[[PriorSpec], GenerateImages]  # of any set


@dataclass(frozen=True)
class PriorImage:
    """A complete image of a set."""

    file: str
    seed: int
    sha256: str  # of the image file


Writes = dict[int, Future[PriorImage]]  # number -> the image that is being written


class PriorSet:
    """The prior images of one spec, in a folder under `root`; they are numbered from 0, without a limit."""

    def __init__(self, root: str | Path, spec: PriorSpec):
        slug = re.sub(r"[^a-z0-9]+", "-", spec.prompt.lower())[:40].strip("-") or "prior"
        self.spec = spec
        shape = "" if spec.width is None else f"{spec.shape.height}x{spec.shape.width}-"
        self.folder = Path(root) / f"{slug}-{shape}{spec.hash}"

    def images(self, count: int) -> dict[int, PriorImage]:
        """The complete images among the first `count`, by number; all checksums are verified."""
        found = {i: self._read(i) for i in range(count)}
        return {i: image for i, image in found.items() if image is not None}

    def missing(self, count: int) -> list[int]:
        """Numbers below `count` of missing or damaged images."""
        present = self.images(count)
        return [i for i in range(count) if i not in present]

    def image_path(self, index: int) -> Path:
        return self.folder / f"{index:04d}.png"

    def latents(self, index: int) -> Tensor:
        """Scaled latents [z, h, w] float32 of a complete image. Raises UserError if they are damaged."""
        kept = load_latents(self._latents_file(index))
        if kept is None:
            remedy = "Run again: missing images are generated anew."
            raise UserError("The latents are damaged", where=self._latents_file(index), remedy=remedy)
        return kept[0]

    def generate_missing(
        self,
        count: int,
        generate: GenerateImages,
        *,
        batch_size: int,
        progress: Callable[[int], object] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[int]:
        """Generates the missing ones of the first `count` images -> their numbers.

        Rank r generates every `world_size`-th image from r on. A batch that lacks one is generated whole, for
        an image's last bits may depend on the size of its batch; what is there already stays. Rank 0 writes
        the manifest; when several ranks are done, one calls `write_manifest`. `progress(n)` is called for
        every n more.
        """
        make_folder(self.folder)
        present = self.images(count)
        numbers = range(rank, count, world_size)
        wanted = [i for i in numbers if i not in present]

        def written(batch: Writes) -> None:
            present.update({i: image.result() for i, image in batch.items()})
            if rank == 0:
                self._write_manifest(present)
            if progress:
                progress(len(batch))

        batches = [numbers[first : first + batch_size] for first in range(0, len(numbers), batch_size)]
        self._generate_and_write(batches, set(wanted), generate, written=written)
        if rank == 0 and not wanted:
            self._write_manifest(present)
        return wanted

    def _generate_and_write(
        self,
        batches: Sequence[Sequence[int]],
        wanted: Set[int],
        generate: GenerateImages,
        *,
        written: Callable[[Writes], None],
    ) -> None:
        """Generates the batches with wanted images, while a thread writes those of the batch before.

        `written` waits for a batch.

        If sampling fails, the images so far are still written; if writing fails, sampling stops.
        """
        pending: Writes = {}
        with ThreadPoolExecutor(1, thread_name_prefix="prior-images") as writer:
            try:
                for batch in batches:
                    if wanted.isdisjoint(batch):
                        continue
                    generated = generate([self.spec.seed + i for i in batch])
                    before, pending = pending, {}
                    if before:
                        written(before)
                    for i, (image, latents) in zip(batch, generated, strict=True):
                        if i not in wanted:
                            continue
                        self._require_finite(i, latents)
                        pending[i] = writer.submit(self._write, i, image, latents)
            finally:
                if pending:
                    written(pending)

    def generate_now(self, numbers: Sequence[int], generate: GenerateImages) -> list[Tensor]:
        """Latents of these images, which are generated in one batch unless all are complete."""
        if any(self._read(number) is None for number in numbers):
            make_folder(self.folder)
            generated = generate([self.spec.seed + number for number in numbers])
            for number, (image, latents) in zip(numbers, generated, strict=True):
                self._require_finite(number, latents)
                self._write(number, image, latents)
        return [self.latents(number) for number in numbers]

    def write_manifest(self, count: int) -> None:
        """Rebuilds manifest.json from the complete images among the first `count`."""
        make_folder(self.folder)
        self._write_manifest(self.images(count))

    def is_listed(self, count: int) -> bool:
        """Whether manifest.json lists the first `count` images: a killed process may have left another."""
        return self._listed().keys() >= set(range(count))

    def _read(self, index: int) -> PriorImage | None:
        kept, path = load_latents(self._latents_file(index)), self.image_path(index)
        if kept is None or kept[1].get("spec") != self.spec.hash or not path.is_file():
            return None
        entry = PriorImage(path.name, int(kept[1]["seed"]), kept[1]["picture_sha256"])
        complete = entry.seed == self.spec.seed + index and entry.sha256 == file_sha256(path)
        return entry if complete else None

    def _write(self, index: int, image: Image.Image, latents: Tensor) -> PriorImage:
        """Writes the image first, then the latents: if interrupted between them, the image is missing."""
        path, seed, encoded = self.image_path(index), self.spec.seed + index, io.BytesIO()
        image.save(encoded, format="PNG")
        with atomic_write(path) as temporary:
            temporary.write_bytes(encoded.getbuffer())
        entry = PriorImage(path.name, seed, hashlib.sha256(encoded.getbuffer()).hexdigest())
        metadata = {"spec": self.spec.hash, "seed": str(seed), "picture_sha256": entry.sha256}
        save_latents(self._latents_file(index), latents, metadata=metadata)
        return entry

    def _require_finite(self, index: int, latents: Tensor) -> None:
        require_finite(latents, where=f"prior image {index}, seed {self.spec.seed + index}")

    def _listed(self) -> dict[int, PriorImage]:
        """The images that manifest.json lists, by number; none if it is not of this set."""
        try:
            manifest = parse_json((self.folder / "manifest.json").read_text(encoding="utf-8"))
            images = [PriorImage(**image) for image in manifest["images"]]
            numbers = [int(image.seed) - self.spec.seed for image in images]
            same = PriorSpec(**manifest["spec"]) == self.spec
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return dict(zip(numbers, images, strict=True)) if same else {}

    def _write_manifest(self, present: dict[int, PriorImage]) -> None:
        """Lists these images, and those that another process or a run of more images has listed."""
        others = {i: image for i, image in self._listed().items() if self.image_path(i).is_file()}
        images = [asdict(image) for _, image in sorted((others | present).items())]
        with atomic_write(self.folder / "manifest.json") as temporary:
            temporary.write_text(json.dumps({"spec": asdict(self.spec), "images": images}, indent=2) + "\n")

    def _latents_file(self, index: int) -> Path:
        return self.folder / f"{index:04d}.safetensors"
