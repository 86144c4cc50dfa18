"""What a run has read, by hash: so that a resumed run says which of its files have changed since it began."""

import json
import logging
import os.path
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from ldm.annotations import Node
from ldm.checkpoints.load import file_hash
from ldm.data.concept_images import file_name
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.items import SourceImage
from ldm.data.prompts import find_prompts
from ldm.engine import distributed
from ldm.errors import UserError
from ldm.files import atomic_write, file_sha256, parse_json, path_sha256, stamp
from ldm.shipped import find_file

log = logging.getLogger(__name__)

FILE = "inputs.json"  # in the run's folder
KINDS = {  # field -> how a sentence begins
    "photos": "The subject's photos",
    "captions": "The subject's captions",
    "masks": "The masks of the subject's photos",
    "prior_photos": "The given photos of the class",
    "prior_captions": "The captions of the class",
    "base": "The base model's files",
    "evaluation": "The evaluation's own files",
}
WORDS = ("sampler", "spacing", "precision", "device")  # params of an evaluation that name no file
Hashes = Mapping[str, str]  # name of a file -> its SHA-256


@dataclass(frozen=True)
class RunInputs:
    """The files of a run by kind, and the photos that are held out for validation."""

    photos: Hashes = field(default_factory=dict)
    captions: Hashes = field(default_factory=dict)
    masks: Hashes = field(default_factory=dict)
    prior_photos: Hashes = field(default_factory=dict)
    prior_captions: Hashes = field(default_factory=dict)
    base: Hashes = field(default_factory=dict)
    held_out: Hashes = field(default_factory=dict)
    evaluation: Hashes | None = None  # None: not known, of older runs

    def changes(self, now: "RunInputs") -> list[str]:
        """One sentence for each kind of file that is not as it was."""
        pairs = {kind: (getattr(self, kind), getattr(now, kind)) for kind in KINDS}
        differences = {kind: _difference(*pair) for kind, pair in pairs.items() if None not in pair}
        return [
            f"{KINDS[kind]} have changed since this run began: {found}"
            for kind, found in differences.items()
            if found
        ]


def keep_inputs(
    folder: Path,
    data: object,
    base: Mapping[str, Path],
    *,
    evaluations: Collection[Node] = (),
    allow_change: bool,
) -> None:
    """Compares what a run reads now with what it read when it began, and keeps it with the run.

    base: network -> file. evaluations: nodes of those of the run. The photo that was held out then is held
    out now, wherever it sorts. Raises UserError for changed files, unless `allow_change`. To be called by all
    processes.
    """
    if not isinstance(data, DreamBoothDataModule):
        return

    def compare() -> RunInputs:
        return _compare(folder, data, inputs_of(data, base, evaluations), allow_change=allow_change)

    data.hold(distributed.on_rank0_broadcast(compare).held_out)


def read_inputs(folder: Path) -> RunInputs | None:
    """What a run has kept; None for a new run."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return RunInputs(**parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        remedy = "Remove the file: the run goes on with the files as they are now."
        raise UserError("The hashes of the run's files cannot be read", where=path, remedy=remedy) from error


def _compare(folder: Path, data: DreamBoothDataModule, now: RunInputs, *, allow_change: bool) -> RunInputs:
    """What the run reads now, with the hold-out of when it began."""
    before = read_inputs(folder)
    if before is not None:
        changes = before.changes(now)
        held = _still_held(before, now) if data.hold_out else {}
        if data.hold_out and before.held_out and not held:
            changes.append(f"The photo that was held out, {', '.join(before.held_out)}, is gone: none is now")
        if now.held_out and not before.held_out:
            log.warning("%s: no photo is held out, because none was when it began", folder)
        now = replace(now, held_out=held)
        if changes and not allow_change:
            remedy = "Restore the files, or add --allow_config_change."
            raise UserError(". ".join(changes), where=folder, remedy=remedy)
        for change in changes:
            log.warning("%s goes on: %s", folder, change)
    if now != before:
        with atomic_write(folder / FILE) as temporary:
            temporary.write_text(json.dumps(asdict(now), indent=2) + "\n", encoding="utf-8")
    return now


def inputs_of(
    data: DreamBoothDataModule, base: Mapping[str, Path], evaluations: Collection[Node] = ()
) -> RunInputs:
    """The files that a run on this data and base, with these evaluations, reads."""
    images = data.images
    photos = {concept.name: images.photos[concept.name] for concept in data.concepts}
    held_out = {concept.name: images.held_out(concept.name) for concept in data.concepts}
    given = {known.prompt: images.of_class(known) for known in data.given_classes}
    return RunInputs(
        photos=_photos(photos, several=len(data.concepts) > 1),
        captions=_captions(photos, several=len(data.concepts) > 1),
        masks=_masks(photos, data.mask_files, several=len(data.concepts) > 1),
        prior_photos=_photos(given, several=len(data.classes) > 1),
        prior_captions=_captions(given, several=len(data.classes) > 1),
        base=_bases(base),
        held_out=_photos(held_out, several=len(data.concepts) > 1),
        evaluation=_of_evaluations(evaluations),
    )


def _bases(base: Mapping[str, Path]) -> dict[str, str]:
    return {_base_name(part, path): base_hash(path) for part, path in base.items()}


def _base_name(part: str, path: Path) -> str:
    """A name that stays when a run is resumed from another folder."""
    return path.name if part == "all" else f"{part}: {path.name}"


def base_hash(path: Path) -> str:
    """`file_hash` of a base model, which is read once in a process as long as its files are untouched."""
    files = [path] if path.suffix != ".json" else sorted(path.parent.iterdir())
    files = sorted(path.rglob("*")) if path.is_dir() else files
    return _hash_of(path, tuple(map(stamp, files)))


@lru_cache(maxsize=8)
def _hash_of(path: Path, stamps: tuple) -> str:
    return file_hash(path)


def _of_evaluations(nodes: Collection[Node]) -> dict[str, str]:
    """What params name, files or folders: lists of prompts, a judge, networks -> hash, by that name."""
    params = [item for node in nodes for item in (node.get("params") or {}).items()]
    values = [value for name, value in params if name not in WORDS]
    names = [value for value in values if isinstance(value, str) and value]
    found = {name: find_prompts(name) or find_file(name) for name in names}
    return {name: path_sha256(path) for name, path in found.items() if os.path.exists(path)}


Groups = Mapping[str, Sequence[SourceImage]]  # name of a concept, or prompt of a class -> its images


def _photos(groups: Groups, *, several: bool) -> dict[str, str]:
    """Name of each image, among `several` groups with that of its own -> hash."""
    return {
        file_name(group, image.path, several=several): image.sha256
        for group, images in groups.items()
        for image in images
    }


def _masks(groups: Groups, files: Mapping[Path, Path], *, several: bool) -> dict[str, str]:
    """Name of each file of a mask that is not the photo's own alpha -> hash."""
    pairs = [(group, image.path) for group, images in groups.items() for image in images]
    return {
        file_name(group, files[photo], several=several): file_sha256(files[photo])
        for group, photo in pairs
        if files.get(photo, photo) != photo
    }


def _captions(groups: Groups, *, several: bool) -> dict[str, str]:
    """Name of each file of captions -> hash."""
    files = {
        file_name(group, image.captions.file, several=several): image.captions.file
        for group, images in groups.items()
        for image in images
        if image.captions.file is not None
    }
    return {name: file_sha256(file) for name, file in files.items()}


def _still_held(before: RunInputs, now: RunInputs) -> dict[str, str]:
    """The held-out photos that are still there: by content, or by name with a content that is new."""
    trained = set(before.photos.values()) - set(before.held_out.values())
    names = {sha256: name for name, sha256 in now.photos.items()}
    found = {}
    for name, sha256 in before.held_out.items():
        there = now.photos.get(name)
        if sha256 in names and there != sha256:
            found[names[sha256]] = sha256
        elif there is not None and there not in trained:
            found[name] = there
    return found


def _difference(before: Hashes, now: Hashes) -> str:
    """ "changed 1.jpg; added 5.jpg, 6.jpg; removed 2.jpg"; empty if nothing differs."""
    kinds = {
        "changed": [name for name in before if name in now and before[name] != now[name]],
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
    }
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names)
