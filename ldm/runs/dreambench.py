"""DreamBench: every subject trained, drawn for its 25 prompts and measured, by any number of processes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from tqdm import tqdm

from ldm.checkpoints.save import DTYPES
from ldm.config import instantiate
from ldm.contact_sheet import save_image
from ldm.data.buckets import Shape
from ldm.data.concepts import IDENTIFIER
from ldm.data.images import ImageFiles, list_images
from ldm.engine.device import device_of
from ldm.engine.locks import share
from ldm.errors import UserError
from ldm.evaluation.dreambench import BenchMetrics, BenchSubject
from ldm.evaluation.image_folder import embedded_settings, is_contact_sheet, prompt_of
from ldm.evaluation.masc import MaskedConsistency, masks_of_photos, require_masc
from ldm.evaluation.statistics import Row
from ldm.files import files_sha256, folder_sha256, make_folder, path_sha256
from ldm.pipeline import Text2Image
from ldm.precision import resolve_precision
from ldm.runs.buckets import build_data
from ldm.runs.grid import Grid, Job, finish, metrics_of, write_text
from ldm.runs.inputs import FILE as INPUTS
from ldm.runs.sampling import in_shapes
from ldm.runs.untrained import base_pipeline
from ldm.runs.validate import validate
from ldm.schema import RunConfig

MEASURED = "measured"  # the variant of its rows
MASC = "masc"  # the network of masked consistency, among those of a benchmark
SAMPLING = ("sampler", "spacing", "steps", "guidance_scale", "negative_prompt", "height", "width")
NOTHING_ELSE = ("evaluation=null", "evaluate_also=null", "online_eval.every_steps=0", "samples.n=1")


@dataclass(frozen=True, kw_only=True)
class DreamBench(Grid):
    """A run of every subject of the dataset, made of it and a config; `of` the dataset's subjects by name.

    images: of each prompt. networks: of the metrics, name -> folder or name on the hub; with one for MASC,
    masked consistency is measured too, for which the photos need masks. pictures: a folder of any tool's
    images, SUBJECT/..., in place of runs.
    """

    KIND: ClassVar[str] = "dreambench"

    of: Mapping[str, BenchSubject]
    images: int
    networks: Mapping[str, str]
    pictures: Path | None = None

    @cached_property
    def runs(self) -> dict[str, Job]:
        """Subject -> its run; none for images of another tool."""
        if self.pictures is not None:
            return {}
        return {job.subject: job for job in self.jobs("dreambooth", NOTHING_ELSE)}

    @property
    def masked(self) -> bool:
        return MASC in self.networks

    def result(self, subject: str) -> Path:
        return self.folder / "results" / f"{subject}.json"

    def identifier(self, subject: str) -> str:
        """The word that its prompts have; `sks` for images of another tool, whose prompts may have any."""
        params = self.runs[subject].config.data["params"] if self.runs else {}
        return params.get("identifier") or IDENTIFIER

    def pictures_of(self, subject: str) -> Path:
        """The folder of its images, by its run or by the other tool."""
        return (self.pictures or self.folder / "pictures") / subject

    def files(self, subject: str) -> dict[str, list[Path]]:
        """Prompt -> the files of its images, there or not, by its run."""
        folder = self.pictures_of(subject)
        prompts = self.of[subject].prompts(self.identifier(subject))
        numbers = range(self.images)
        return {
            prompt: [folder / f"{k:02d}-{i:02d}.png" for i in numbers] for k, prompt in enumerate(prompts)
        }

    def given(self, subject: str) -> dict[str, Sequence[Image.Image]]:
        """Prompt -> its images, of the run, where they are drawn, or of the other tool."""
        if self.pictures is None:
            return {prompt: ImageFiles(files) for prompt, files in self.files(subject).items()}
        return given_images(self.pictures_of(subject), self.of[subject].prompts(self.identifier(subject)))

    def check_all(self) -> None:
        """Raises UserError for a config, or for images of another tool, that cannot be used."""
        if self.masked:
            require_masc()
            for subject in self.of.values():
                masks_of_photos(subject.photos)
        if self.pictures is None:
            for run in self.runs.values():
                validate(run.config, run_folder=run.begun)
        else:
            for name in self.of:
                self.given(name)

    def run_hash(self, subject: str) -> str | None:
        """Names a subject's run as it is; None before its end. A new training has another: other times.

        Raises UserError for a run of another config or base.
        """
        job = self.runs[subject]
        if metrics_of(job) is None:
            return None
        files = [job.folder / name for name in ("config.yaml", INPUTS, "metrics.json")]
        return files_sha256([path for path in files if path.exists()], within=job.folder)

    def key(self, subject: str) -> dict[str, Any]:
        """What decides a subject's row; of files their hash, so that folders may move."""
        networks = {
            name: path_sha256(Path(network)) if Path(network).exists() else network
            for name, network in self.networks.items()
        }
        return networks | {
            "seed": self.seeds[0],
            "images": self.images,
            "prompts": self.of[subject].prompts(self.identifier(subject)),
            "photos": folder_sha256(self.of[subject].photos),
            "pictures": folder_sha256(self.pictures_of(subject)),
            "run": self.run_hash(subject) if self.runs else None,
        }

    def row(self, subject: str) -> Row | None:
        """The metrics of a subject that is finished, if all that decides them is as it was.

        It may have masked consistency without being asked for it.
        """
        path = self.result(subject)
        if not path.exists():
            return None
        row = json.loads(path.read_text(encoding="utf-8"))
        return row if self.key(subject).items() <= row.get("key", {}).items() else None


def work(bench: DreamBench, measure: BenchMetrics, masked: MaskedConsistency | None = None) -> None:
    """Finishes all subjects that no other process works on, until there are none.

    Each once: a command with other settings beside it may replace what is finished, which has no end.
    """
    finished: set[str] = set()

    def run(number: int, name: str) -> None:
        print(f"{bench.name}, subject {number} of {len(bench.of)}: {name}", flush=True)
        _finish(bench, name, measure, masked)
        finished.add(name)

    def is_done(name: str) -> bool:
        return name in finished or bench.row(name) is not None

    share(list(bench.of), bench.folder / "locks", is_done=is_done, finish=run)


def _finish(bench: DreamBench, name: str, measure: BenchMetrics, masked: MaskedConsistency | None) -> None:
    """Trains, draws and measures a subject, as far as that is not done."""
    if bench.pictures is None:
        finish(bench.runs[name])
        draw(bench, name)
    key = bench.key(name)  # of what is read from here on
    images, photos = bench.given(name), ImageFiles(list_images(bench.of[name].photos))
    found = measure(images, photos, identifier=bench.identifier(name))
    every = [image for group in images.values() for image in group]
    if masked is not None:
        found |= masked(every, bench.of[name].photos)
    row = {"variant": MEASURED, "subject": name, "seed": bench.seeds[0], **found}
    row |= {"images": len(every), "key": key}
    make_folder(bench.result(name).parent)
    write_text(bench.result(name), json.dumps(row, indent=2) + "\n")


def draw(bench: DreamBench, name: str) -> None:
    """Images of every prompt by the run of a subject; those of this very run are not drawn again."""
    job, config = bench.runs[name], bench.runs[name].config.samples
    settings, run_hash = {key: getattr(config, key) for key in SAMPLING}, bench.run_hash(name)
    shapes = sample_shapes(job.config)
    told = settings | {"shapes": list(map(str, shapes)), "run": run_hash}
    wanted = [
        (file, {"prompt": prompt, "seed": config.seed + i, **told})
        for prompt, group in bench.files(name).items()
        for i, file in enumerate(group)
    ]
    missing = [(file, about) for file, about in wanted if not _is_drawn(file, about)]
    if not missing:
        return
    make_folder(bench.pictures_of(name))
    pipeline = in_shapes(_pipeline(job), shapes)
    how = {"batch_size": config.batch_size, "precision": config.precision}
    with tqdm(total=len(missing), desc=f"images of {name}", unit="image", disable=None) as bar:
        for first in range(0, len(missing), config.batch_size):
            batch = missing[first : first + config.batch_size]
            prompts, seeds = ([about[key] for _, about in batch] for key in ("prompt", "seed"))
            samples = pipeline(prompts, seeds=seeds, **settings, **how)
            for (file, about), sample in zip(batch, samples, strict=True):
                save_image(file, sample.image, about)
            bar.update(len(batch))


def _is_drawn(file: Path, about: Mapping[str, Any]) -> bool:
    """Whether an image was drawn with these settings, which its own metadata has."""
    return embedded_settings(file) == json.loads(json.dumps(about))


def sample_shapes(config: RunConfig) -> tuple[Shape, ...]:
    """The shapes of the photos of a run in buckets, in which its images are drawn in turn."""
    with torch.device("meta"):
        module = instantiate(config.model)
    return build_data(config, module).sample_shapes


def _pipeline(job: Job) -> Text2Image:
    device = device_of(job.config.trainer)
    how = {"device": device, "dtype": DTYPES[resolve_precision(job.config.samples.precision, device)]}
    base = None
    if job.config.samples.guidance_base:
        base = base_pipeline(job.config, **how).denoiser
    return Text2Image.from_file(job.folder / "model.safetensors", guidance_base=base, **how)


def given_images(folder: Path, prompts: Sequence[str]) -> dict[str, Sequence[Image.Image]]:
    """Prompt -> its images in a folder of any tool.

    The prompt is in the .txt file beside an image or in its metadata; else its name or that of its folder
    begins with the number of the prompt, from 0: 07-2.png, 07/2.png.
    """
    folders = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    found = [path for place in folders if _has_files(place) for path in list_images(place)]
    paths = [path for path in found if not is_contact_sheet(path)]
    groups: dict[str, list[Path]] = {}
    for path in paths:
        numbered = re.match(r"\d+", (path if path.parent == folder else path.parent).name)
        prompt, number = prompt_of(path), int(numbered[0]) if numbered else None
        if prompt is None and number is not None and number < len(prompts):
            prompt = prompts[number]
        if prompt is None:
            remedy = f"Write a .txt file beside it, or begin its name with 00 to {len(prompts) - 1:02d}."
            raise UserError("It is not known which prompt this image is of", where=path, remedy=remedy)
        groups.setdefault(prompt, []).append(path)
    if not groups:
        raise UserError("There are no images of the subject", where=folder, remedy="Generate them first.")
    return {prompt: ImageFiles(found) for prompt, found in groups.items()}


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_file() for path in folder.iterdir())


def left(bench: DreamBench) -> list[str]:
    """The subjects that are still to be done."""
    return [name for name in bench.of if bench.row(name) is None]


def not_the_protocol(rows: Sequence[Row]) -> list[str]:
    """How this differs from 30 subjects with 25 prompts and 4 images, a sentence each."""
    said = [] if len(rows) == 30 else [f"the paper has 30 subjects, here are {len(rows)}"]
    counts = {row["images"] for row in rows}
    found = " or ".join(map(str, sorted(counts)))
    return said if counts == {100} else [*said, f"the paper has 100 images of each, here are {found}"]
