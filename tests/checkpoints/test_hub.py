"""Models by their id on the Hugging Face hub: a server of our own answers as the hub does."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, snapshot_download

from ldm.checkpoints.find_model import find_model
from ldm.checkpoints.hub import HubModel, _link, choose, local_path
from ldm.checkpoints.infer_config import model_config
from ldm.checkpoints.known import flat
from ldm.checkpoints.load import file_hash, open_model
from ldm.checkpoints.save_folder import save_folder
from ldm.commands.dreambooth import main
from ldm.errors import UserError
from ldm.families.sd.family import SD1
from ldm.model_file import ModelFile
from tests import factories

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = [f"unet/diffusion_pytorch_model-{k:05d}-of-00002.safetensors" for k in (1, 2)]
CONFIGS = [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]
SAFE = ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]


@dataclass
class Hub:
    """Repositories by name, each a folder; files that were asked for; what is refused."""

    root: Path
    asked: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)

    def repo(self, name: str) -> Path:
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return self.root / name


class Answer(BaseHTTPRequestHandler):
    """The calls of the hub that a download makes."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: object, hub: Hub):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        path = self.path.split("?")[0].lstrip("/")
        if found := re.fullmatch(r"api/models/(\w+/[\w.-]+?)(/revision/(.+)|/tree/(.+))?", path):
            return self._about(found[1], found[3] or found[4] or "main", tree=bool(found[4]))
        repo, file = re.fullmatch(r"(\w+/[\w.-]+)/resolve/\w+/(.+)", path).groups()
        if {repo, file} & self.hub.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        content = (self.hub.root / repo / file).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.hub.asked += [file] if body else []
        return self._send(200, content, headers, body=body)

    def _about(self, repo: str, revision: str, *, tree: bool) -> None:
        folder = self.hub.root / repo
        if not folder.is_dir():
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v2", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        if tree:
            listed = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()]
            return self._send(200, json.dumps(listed).encode(), {})
        siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
        about = {
            "id": repo,
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
        }
        return self._send(200, json.dumps(about).encode(), {})

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, an empty cache, and the variables that point to both."""
    hub = Hub(tmp_path / "hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Answer, hub=hub))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    values = {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    values |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub")}
    values |= {"HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}"}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.chdir(tmp_path)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A diffusers folder as it lies on the hub: also what nobody needs."""
    config, repo = factories.model_config(tiny_tokenizer), tmp_path_factory.mktemp("saved") / "tiny"
    state_dicts = {name: network.state_dict() for name, network in factories.networks(config).items()}
    about = model_config(state_dicts, flat(config))
    save_folder(repo, state_dicts, config=about, tokenizer=tiny_tokenizer, size=16, dtype=torch.float32)
    for stem in SAFE:
        shutil.copy(repo / f"{stem}.safetensors", repo / f"{stem}.fp16.safetensors")
        (repo / f"{stem}.bin").write_bytes(b"never read")
    (repo / "unet/diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"never read")
    for other in (
        "README.md",
        "whole.ckpt",
        "safety_checker/model.safetensors",
        "safety_checker/config.json",
    ):
        (repo / other).parent.mkdir(exist_ok=True)
        (repo / other).write_bytes(b"never read")
    return repo


@pytest.fixture
def pipeline(hub: Hub, saved: Path) -> Path:
    return shutil.copytree(saved, hub.repo("owner/tiny"), dirs_exist_ok=True)


def small(repo: Path) -> set[str]:
    """What is read besides the weights of the networks."""
    folders = [repo / name for name in ("tokenizer", "scheduler")]
    files = {p.relative_to(repo).as_posix() for folder in folders for p in folder.iterdir()}
    return {"model_index.json", *CONFIGS, *files}


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "owner/name": ("owner/name", "main", None, None),
        "stable-diffusion-v1-5/a": ("stable-diffusion-v1-5/a", "main", None, None),
        "o/n@refs/pr/3": ("o/n", "refs/pr/3", None, None),
        "o/n:fp16": ("o/n", "main", None, "fp16"),
        "o/n@v2:a/b.safetensors": ("o/n", "v2", "a/b.safetensors", None),
        "o/n.v1:x.safetensors.index.json": ("o/n.v1", "main", "x.safetensors.index.json", None),
    }.items(),
)  # fmt: skip
def test_an_id_is_read(name, parts, workdir):
    assert HubModel.of(name) == HubModel(*parts)
    assert str(HubModel.of(name)) == name and HubModel.of(Path(name)) == HubModel.of(name)


@pytest.mark.parametrize(
    "name",
    ["name", "a/b/c", "./a/b", "../b", "/a/b", "~/b", "a/b.ckpt", "logs/run", "there/model", "a/", "a/b c"],
)
def test_a_path_is_no_id(name, workdir):
    (workdir / "logs").mkdir()
    (workdir / "there/model").mkdir(parents=True)
    assert HubModel.of(name) is None and local_path(name) == Path(name)


def test_only_the_files_that_are_read_are_asked_for(hub, pipeline):
    folder = local_path("owner/tiny")
    wanted = small(pipeline) | {f"{stem}.safetensors" for stem in SAFE}
    assert set(hub.asked) == wanted and len(hub.asked) == len(wanted)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == wanted
    assert folder.name == "owner--tiny"
    assert all((folder / name).read_bytes() == (pipeline / name).read_bytes() for name in wanted)
    assert find_model(Path("owner/tiny")) == folder
    file, same = ModelFile("owner/tiny"), ModelFile(pipeline)
    file.fill()
    same.fill()
    for name, network in file.networks.items():
        assert all(map(torch.equal, network.state_dict().values(), same.networks[name].state_dict().values()))


def test_a_variant_is_asked_for_by_name(hub, pipeline):
    local_path("owner/tiny:fp16")
    assert {n for n in hub.asked if n.endswith(".safetensors")} == {f"{s}.fp16.safetensors" for s in SAFE}
    with pytest.raises(UserError, match="no weights of the variant fp8 of unet, vae, text_encoder"):
        local_path("owner/tiny:fp8")


def test_one_file_and_one_network_are_read(hub, pipeline, tiny_model_file):
    shutil.copy(tiny_model_file, pipeline / "one.safetensors")
    assert file_hash(local_path("owner/tiny:one.safetensors")) == file_hash(tiny_model_file)
    assert hub.asked == ["one.safetensors"]
    shutil.copytree(pipeline / "vae", hub.repo("owner/vae"), dirs_exist_ok=True)
    local_path("owner/vae")
    assert sorted(hub.asked[1:]) == ["config.json", "diffusion_pytorch_model.safetensors"]
    with pytest.raises(UserError, match="no file two.safetensors.*it has .*one.safetensors"):
        local_path("owner/tiny:two.safetensors")


def test_what_is_here_needs_no_network(hub, pipeline, monkeypatch):
    """A base that was downloaded once, also where its branch has moved on; what other tools have cached."""
    folder = local_path("owner/tiny")
    before, hub.asked[:] = file_hash(folder), []
    (pipeline / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"another version")
    assert local_path("owner/tiny") == folder and hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (hub.root / "../home/hub/models--owner--tiny/snapshots" / COMMIT / "extra.safetensors").write_bytes(b"x")
    assert file_hash(local_path("owner/tiny")) == before
    shutil.rmtree(folder)
    assert file_hash(local_path("owner/tiny")) == before and hub.asked == []


def test_a_process_that_comes_second_takes_nothing_away(hub, pipeline):
    """The first may be reading the folder, through links that are the same."""
    folder = local_path("owner/tiny")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink()]
    (snapshot,) = (hub.root / "../home/hub/models--owner--tiny/snapshots").iterdir()
    made = folder.stat().st_ino
    _link(snapshot, names, folder)
    assert folder.stat().st_ino == made and not list(folder.parent.glob(".*.tmp"))
    (folder / names[0]).unlink()
    _link(snapshot, names, folder)
    assert folder.stat().st_ino != made and (folder / names[0]).exists()
    (folder / "gone.json").symlink_to(hub.root / "pruned")  # of an older revision
    _link(snapshot, names, folder)
    assert not (folder / "gone.json").is_symlink() and (folder / names[0]).exists()


def as_variant(stem: str, variant: str, *, sharded: bool) -> list[str]:
    """Weights of a variant as diffusers names them."""
    if not sharded:
        return [f"{stem}.{variant}.safetensors"]
    shards = [f"{stem}.{variant}-{k:05d}-of-00002.safetensors" for k in (1, 2)]
    return [f"{stem}.safetensors.index.{variant}.json", *shards]


@pytest.mark.parametrize(
    ("part", "variant", "sharded"),
    [(None, "fp16", False), ("unet", "fp16", True), ("unet", "non_ema", False)],
    ids=["pipeline", "shards of a network", "another variant"],
)
def test_a_variant_in_the_cache_is_not_full_precision(hub, pipeline, monkeypatch, part, variant, sharded):
    """Another tool has cached a variant: without one in the id, the base is what it is on a fresh machine."""
    root = (
        pipeline
        if part is None
        else shutil.copytree(pipeline / part, hub.repo("owner/net"), dirs_exist_ok=True)
    )
    name = "owner/tiny" if part is None else "owner/net"
    stems = SAFE if part is None else ["diffusion_pytorch_model"]
    cached = [n for stem in stems for n in as_variant(stem, variant, sharded=sharded)]
    for file in cached:
        (root / file).write_bytes(b"{}" if file.endswith(".json") else b"rounded")
    fresh = file_hash(local_path(name))
    shutil.rmtree(hub.root / "../home")
    rest = small(pipeline) if part is None else ["config.json"]
    snapshot_download(name, allow_patterns=[*rest, *cached])
    hub.asked.clear()
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="not on this machine.*HF_HUB_OFFLINE is set") as caught:
            local_path(name)
        assert str(caught.value).count("\n") == 0 and HubModel.of(name).local() is None
        assert local_path(f"{name}:{variant}").is_dir() and hub.asked == []
    assert file_hash(local_path(name)) == fresh
    assert sorted(hub.asked) == sorted(f"{stem}.safetensors" for stem in stems)


def test_a_repository_of_one_variant_alone_is_read(hub, pipeline, monkeypatch):
    for stem in SAFE:
        (pipeline / f"{stem}.safetensors").unlink()
        (pipeline / f"{stem}.bin").unlink()
    (pipeline / "unet/diffusion_pytorch_model.non_ema.safetensors").unlink()
    variant = local_path("owner/tiny:fp16")
    hub.asked.clear()
    folder = local_path("owner/tiny")
    assert folder != variant and file_hash(folder) == file_hash(variant) and hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_path("owner/tiny") == folder


def test_a_download_goes_on_with_what_is_missing(hub, pipeline):
    last = "vae/diffusion_pytorch_model.safetensors"
    hub.gated.add(last)
    with pytest.raises(UserError, match="gated"):
        local_path("owner/tiny")
    assert HubModel.of("owner/tiny").local() is None
    hub.gated.clear()
    folder = local_path("owner/tiny")
    assert len(hub.asked) == len(set(hub.asked)) and set(hub.asked) > {last}
    assert file_hash(folder / last) == file_hash(pipeline / last)


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "owner/none": "neither such a path nor such a model on the Hugging Face hub",
        "owner/tiny@v9": "no such revision",
        "owner/closed": "gated.*Accept it on https://huggingface.co/owner/closed",
        "owner/flux": "a FluxPipeline, not of Stable Diffusion",
        "owner/empty": "no diffusers folder.*it has no weights",
    }.items(),
)
def test_a_refusal_is_one_sentence(hub, name, said):
    files = ["model_index.json", *CONFIGS, *(f"{stem}.safetensors" for stem in SAFE)]
    for repo in ("closed", "flux", "tiny"):
        for file in files:
            path = hub.repo(f"owner/{repo}") / file
            path.parent.mkdir(exist_ok=True)
            path.write_text('{"_class_name": "FluxPipeline"}')
    hub.gated.add("owner/closed")
    hub.repo("owner/empty")
    with pytest.raises(UserError, match=said) as caught:
        open_model(name)
    assert str(caught.value).count("\n") == 0
    assert not [n for n in hub.asked if n.endswith(".safetensors")]


@pytest.mark.parametrize("how", ["offline", "unreachable"])
def test_without_a_network_the_sentence_says_what_to_do(hub, monkeypatch, how):
    changed = ("HF_HUB_OFFLINE", True) if how == "offline" else ("ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, *changed)
    with pytest.raises(
        UserError, match="not on this machine.*owner/tiny.*where there is a network"
    ) as caught:
        local_path("owner/tiny")
    assert str(caught.value).count("\n") == 0


def test_the_family_is_known_before_the_weights(hub, pipeline):
    assert HubModel.of("owner/tiny").family() is SD1
    assert set(hub.asked) == {"model_index.json", "unet/config.json"}


def test_shards_come_with_their_index():
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    rest = ["model_index.json", *CONFIGS, *(f"{stem}.safetensors" for stem in SAFE[1:])]
    assert set(choose([index, *SHARDS, *rest], file=None, variant=None)) == {index, *SHARDS, *rest}
    for lacking in SHARDS:
        with pytest.raises(UserError, match="no weights of unet"):
            choose([index, *rest, *(set(SHARDS) - {lacking})], file=None, variant=None)
    named = "m.fp16.safetensors.index.json"
    shards = [f"m.fp16-0000{k}-of-00002.safetensors" for k in (1, 2)]
    assert choose([named, *shards, "m.safetensors"], file=named, variant=None) == [named, *shards]


def test_a_run_from_the_hub(hub, pipeline, words, monkeypatch, capsys):
    """A dry run says what it would download; a run downloads when all else is right; a resume is offline."""
    words = [*words, "base_checkpoint=owner/tiny", "trainer.max_steps=1"]
    assert main([*words, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"to be downloaded for owner/tiny: \d+ files, \d+.\d MB: model_index.json, ", said)
    assert f"{SAFE[0]}.safetensors (4.3 MB)" in said
    assert main([*words, "--dry_run", "base_checkpoint=owner/none"]) == 2
    assert main([*words, "samples.prompts.0=a {breed}"]) == 2
    assert set(hub.asked) <= {"model_index.json", "unet/config.json"}
    assert main(words) == 0
    assert f"{SAFE[0]}.safetensors" in hub.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["--resume", "one", "trainer.max_steps=2", "--allow_config_change"]) == 0
    about = json.loads(Path("logs/one/inputs.json").read_text())["base"]
    assert about == {"owner--tiny": file_hash(local_path("owner/tiny"))}


def test_a_base_of_another_family_is_refused_before_its_weights(hub, pipeline, words, capsys):
    index = pipeline / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    for more in ([], ["--dry_run"]):
        assert main([*words, "base_checkpoint=owner/tiny", *more]) == 2
        assert (
            "a model of Stable Diffusion XL, but the config is of Stable Diffusion 1.x"
            in capsys.readouterr().err
        )
    assert set(hub.asked) == {"model_index.json", "unet/config.json"}
