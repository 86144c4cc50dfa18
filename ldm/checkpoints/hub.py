"""Models of the Hugging Face hub by their id, in place of a path: only files that are read are downloaded.

    owner/name                      a diffusers folder, or that of one network, in full precision
    owner/name@revision             of a branch, a tag or a commit
    owner/name:fp16                 the folder's files of this variant
    owner/name:file.safetensors     one file, or the index of its shards

Files lie in the hub's own cache, where other tools find them; a download that was interrupted goes on. What
is read is a folder of links beside the cache: so the hash of a base does not depend on what else is
downloaded, and a model that is there needs no network, also where its branch has moved on since.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path, PurePosixPath

from ldm.checkpoints.diffusers_config import read_json
from ldm.checkpoints.folder import PIPELINES, REST_FILE, SHARD, XL_PIPELINES, weights_rank
from ldm.checkpoints.shards import INDEX
from ldm.errors import UserError
from ldm.families.family import Family
from ldm.families.sd.family import SD1, SD2
from ldm.families.sdxl.family import SDXL
from ldm.files import make_folder, require_space

log = logging.getLogger(__name__)

ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]*\w)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./+-]+))?")
FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".json", ".yaml", ".yml")  # a path that is missing
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")  # folders with weights
SETTINGS = ("tokenizer", "tokenizer_2", "scheduler")  # folders of small files
SMALL = (".json", ".txt")
MODEL_INDEX = "model_index.json"
SITE = "https://huggingface.co"


@dataclass(frozen=True)
class HubModel:
    """What an id names."""

    repo: str
    revision: str = "main"
    file: str | None = None
    variant: str | None = None

    @classmethod
    def of(cls, name: str | Path) -> "HubModel | None":
        """The model that a name stands for; None if it is a path, there or missing.

        A folder of the first word's name makes it a path: `logs/x` beside a folder `logs` is no id.
        """
        text = name.as_posix() if isinstance(name, Path) else name
        found = ID.fullmatch(text)
        if found is None or Path(text).exists() or Path(text).parent.is_dir():
            return None
        repo, revision, file = found["repo"], found["revision"] or "main", found["file"]
        if file is None and repo.endswith(FILES):
            return None
        if not {"", ".", ".."}.isdisjoint([*revision.split("/"), *(file or "x").split("/")]):
            return None  # they would lead out of the hub's folder
        is_file = file is not None and file.endswith(FILES)
        return cls(repo, revision, file if is_file else None, None if is_file else file)

    @property
    def folder(self) -> Path:
        """Its links, .../WHICH/OWNER--NAME: models for few steps are known by that name."""
        from huggingface_hub import constants

        which = "-".join(filter(None, (self.revision, self.variant, self.file))).replace("/", "--")
        return Path(constants.HF_HOME, "dreambooth", which, self.repo.replace("/", "--"))

    def local(self) -> Path | None:
        """Where it lies on this machine, whole; None if it has to be downloaded."""
        links = [path for path in self.folder.rglob("*") if path.is_symlink() or path.is_file()]
        if not links or not all(path.exists() for path in links):
            return None
        return self.folder / (self.file or "")

    @cached_property
    def listing(self) -> "Listing":
        """What the hub has; asks the network. Raises UserError where that fails."""
        from huggingface_hub import HfApi

        with explained(str(self), page=self.repo):
            info = HfApi().model_info(self.repo, revision=self.revision, files_metadata=True)
        return Listing(info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()})

    def wanted(self) -> dict[str, int]:
        """The files that are read -> their bytes. Raises UserError if there is no model in them."""
        try:
            names = choose(list(self.listing.sizes), file=self.file, variant=self.variant)
        except UserError as error:
            raise UserError(error.what, where=self, remedy=error.remedy) from error
        return {name: self.listing.sizes[name] for name in names}

    def family(self) -> Family | None:
        """The family of a pipeline, by two small files, which are downloaded; None for other things.

        Raises UserError for a pipeline that is not of Stable Diffusion 1.x, 2.x or XL.
        """
        if MODEL_INDEX not in self.wanted():
            return None
        folder = self._download([MODEL_INDEX, "unet/config.json"])
        kind = read_json(folder / MODEL_INDEX).get("_class_name", "")
        if kind not in PIPELINES + XL_PIPELINES:
            what = f"This is a {kind}, not of Stable Diffusion 1.x, 2.x or XL"
            raise UserError(what, where=self, remedy="Name another model.")
        if kind in XL_PIPELINES:
            return SDXL
        return SD2 if read_json(folder / "unet/config.json").get("use_linear_projection") else SD1

    def download(self) -> Path:
        """The folder or file on this machine; what is missing is downloaded, with a bar. Raises UserError."""
        if (found := self.local()) is not None:
            return found
        cached = self._in_cache()
        if cached is None:
            wanted = self.wanted()
            self.family()  # refuses other pipelines
            log.info("%s: downloading %s", self, describe(wanted))
            cached = self._download(list(wanted)), list(wanted)
        _link(*cached, self.folder)
        return self.folder / (self.file or "")

    def _download(self, names: Sequence[str]) -> Path:
        """The cache's folder of this revision, with these files."""
        from huggingface_hub import constants, snapshot_download

        with explained(str(self), page=self.repo):
            make_folder(Path(constants.HF_HUB_CACHE))
            require_space(Path(constants.HF_HUB_CACHE), self._missing_bytes(names), what=self.repo)
            patterns = [escape(name) for name in names]
            return Path(snapshot_download(self.repo, revision=self.revision, allow_patterns=patterns))

    def _missing_bytes(self, names: Sequence[str]) -> int:
        from huggingface_hub import try_to_load_from_cache

        commit = self.listing.commit
        missing = [
            n for n in names if not isinstance(try_to_load_from_cache(self.repo, n, revision=commit), str)
        ]
        return sum(self.listing.sizes[name] for name in missing)

    def _in_cache(self) -> tuple[Path, list[str]] | None:
        """The cache's folder and the files that are read of it, if another tool has downloaded them all.

        Without a variant in the id, weights of one do not do: what the hub has in full precision may not be
        in the cache, and the base would depend on what else was downloaded.
        """
        from huggingface_hub import try_to_load_from_cache

        for sign in (self.file, MODEL_INDEX, "config.json"):
            found = sign and try_to_load_from_cache(self.repo, sign, revision=self.revision)
            if not isinstance(found, str):
                continue
            snapshot = Path(found)
            for _ in PurePosixPath(sign).parts:
                snapshot = snapshot.parent
            names = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
            try:
                chosen = choose(names, file=self.file, variant=self.variant)
            except UserError:  # not all is there
                return None
            unasked = self.file is None and self.variant is None and any(map(_has_variant, chosen))
            return None if unasked else (snapshot, chosen)
        return None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        file = self.file or self.variant
        return f"{self.repo}{revision}{f':{file}' if file else ''}"


@dataclass(frozen=True)
class Listing:
    """A repository of the hub at a commit: its files by name, with their bytes."""

    commit: str
    sizes: Mapping[str, int]


def local_path(name: str | Path) -> Path:
    """A path as it is; what a hub id names is downloaded, unless it is here. Raises UserError."""
    model = HubModel.of(name)
    return Path(name) if model is None else model.download()


def describe(files: Mapping[str, int]) -> str:
    """ "3 files, 4.27 GB: model_index.json, unet/config.json, ..."; large ones with their size."""
    names = [f"{name} ({_bytes(size)})" if size >= 10**6 else name for name, size in files.items()]
    return f"{len(files)} files, {_bytes(sum(files.values()))}: {', '.join(names)}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"


def choose(names: Sequence[str], *, file: str | None, variant: str | None) -> list[str]:
    """The files of a repository that are read, of all its names. Raises UserError if they are no model."""
    if file is not None:
        if file not in names:
            raise UserError(f"There is no file {file}", remedy=_files_remedy(names))
        found = _shards_of(file, names) if file.endswith(INDEX) else [file]
        if not found:
            raise UserError(f"Shards of {file} are missing", remedy=_files_remedy(names))
        return found
    if MODEL_INDEX in names:
        return _of_pipeline(names, variant)
    if "config.json" in names and (weights := _weights("", names, variant)):
        return ["config.json", *weights]
    raise UserError("There is no diffusers folder", remedy=_files_remedy(names))


def _of_pipeline(names: Sequence[str], variant: str | None) -> list[str]:
    chosen, bare = [MODEL_INDEX], []
    for part in NETWORKS:
        if f"{part}/config.json" not in names:
            continue
        weights = _weights(f"{part}/", names, variant)
        chosen += [f"{part}/config.json", *weights, *(n for n in names if n == f"{part}/{REST_FILE}")]
        bare += [] if weights else [part]
    needed = [part for part in NETWORKS[:3] if f"{part}/config.json" not in names]
    if bare or needed:
        of = f" of the variant {variant}" if variant else ""
        what = f"There are no weights{of} of {', '.join(bare + needed)}"
        raise UserError(what, remedy="Name another revision, variant or model.")
    small = [n for n in names if n.split("/")[0] in SETTINGS and n.count("/") == 1 and n.endswith(SMALL)]
    return chosen + small


def _weights(prefix: str, names: Sequence[str], variant: str | None) -> list[str]:
    """The best weights of one network, with all shards where they are an index; of one variant if given."""
    here = [
        n.removeprefix(prefix) for n in names if n.startswith(prefix) and "/" not in n.removeprefix(prefix)
    ]
    if variant is not None:
        here = [name for name in here if variant in re.split(r"[.-]", name)]
    ranked = sorted((rank, name) for name in here if (rank := weights_rank(Path(name))) is not None)
    if not ranked:
        return []
    best = ranked[0][1]
    return [prefix + name for name in (_shards_of(best, here) if best.endswith(".json") else [best])]


def _has_variant(name: str) -> bool:
    """Whether this is the file of a network's weights, or their index, in fp16 or another variant."""
    rank = weights_rank(Path(name))
    return rank is not None and rank[1] > 0


def _shards_of(index: str, names: Sequence[str]) -> list[str]:
    """An index and its shards: of the same words, but for their numbers; none if a shard is missing."""
    words = sorted(word for word in re.split(r"[./]", index) if word not in ("index", "json"))
    shards = [
        name
        for name in names
        if SHARD.search(name) and sorted(re.split(r"[./]", SHARD.sub("", name))) == words
    ]
    count = max((int(SHARD.search(name)[0][-5:]) for name in shards), default=-1)
    return [index, *shards] if len(shards) == count else []


def _files_remedy(names: Sequence[str]) -> str:
    found = [n for n in names if n.endswith((".safetensors", ".ckpt")) and not SHARD.search(n)]
    listed = f"it has {', '.join(found[:8])}" if found else "it has no weights"
    return f"Write owner/name:FILE for one of its files; {listed}."


def _link(snapshot: Path, names: Sequence[str], folder: Path) -> None:
    """Makes `folder` of links to these files of the cache, whole or not at all; or of copies."""
    make_folder(folder.parent)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    for name in names:
        (building / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            (building / name).symlink_to((snapshot / name).resolve())
        except OSError:  # Windows, without the right to
            shutil.copyfile(snapshot / name, building / name)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if there == set(names) and all((folder / n).resolve() == (snapshot / n).resolve() for n in names):
        shutil.rmtree(building)  # another process was first, and may be reading there
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rename(building, folder)
    except OSError:  # another process was first
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def explained(model: str, *, page: str) -> Iterator[None]:
    """Raises UserError for what the hub or the network refuses inside the block, in one sentence.

    model: as the user named it. page: the repository, on which a licence is accepted.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError) as error:
        chain = list(_chain(error))

        def is_a(*kinds: type[Exception]) -> bool:
            return any(isinstance(link, kinds) for link in chain)

        if is_a(errors.GatedRepoError):
            what = "The model is gated: its licence has to be accepted first"
            remedy = f"Accept it on {SITE}/{page}, then log in with `hf auth login`."
        elif is_a(errors.RevisionNotFoundError):
            what, remedy = "The model has no such revision", f"See {SITE}/{page}."
        elif is_a(errors.RepositoryNotFoundError):
            what = "There is neither such a path nor such a model on the Hugging Face hub"
            remedy = "Check the name; a private model needs `hf auth login`."
        elif isinstance(error, UserError) or not is_a(errors.HTTPError, errors.EntryNotFoundError, OSError):
            raise
        else:
            reason = "HF_HUB_OFFLINE is set" if is_a(errors.OfflineModeIsEnabled) else _reason(chain)
            what = f"The model is not on this machine, and the hub does not give it: {reason}"
            remedy = "Give a path, or run the command once where there is a network."
        raise UserError(what, where=model, remedy=remedy) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(chain: Sequence[BaseException]) -> str:
    """The first line of the first cause."""
    text = str(chain[-1]).strip()
    return text.splitlines()[0].removesuffix(".") if text else type(chain[-1]).__name__
