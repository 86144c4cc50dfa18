"""Words of commands, studies, searches and nodes of configs: each is taken, or refused before any work."""

import copy
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ldm import commands
from ldm.checkpoints.hub import HubModel, local_path
from ldm.commands import (
    caption,
    check_photos,
    convert,
    dreambench,
    evaluate,
    make_masks,
    publish,
    sample,
    search,
    study,
)
from ldm.config import instantiate, load_config, to_container
from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.runs.options import parse
from ldm.runs.publish import check_target
from ldm.runs.search import Search
from ldm.runs.sweep import jobs_of, read_sweep
from ldm.sampler_nodes import sampling_levels
from tests.factories import SCHEDULE, photos
from tests.hostile.conftest import SECRET, examples, refused_or
from tests.hostile.test_configs import VALUES, leaves

ROOT = Path(__file__).resolve().parents[2]
FILES = {  # of each kind of run
    path.relative_to(ROOT).as_posix(): to_container(load_config([path]))
    for path in [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "configs/storybook/base.yaml"]
}
odd = VALUES | st.sampled_from(
    [
        "${oc.env:SECRET}",
        "${oc.decode:${oc.env:SECRET}}",
        "9" * 5000,
        "../../x",
        "[" * 3000,
        1e308,
        -0.0,
        2**64,
    ]
)


@examples(8)
@given(data=st.data(), file=st.sampled_from(sorted(FILES)), cut=st.integers(1, 5), value=odd)
def test_any_value_in_any_config(data, file: str, cut: int, value: object, tmp_path: Path):
    config = copy.deepcopy(FILES[file])
    key = data.draw(st.sampled_from(leaves(config)))
    node = config
    for name in key[:cut][:-1]:
        node = node[name]
    node[key[:cut][-1]] = value
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    parsed = refused_or(lambda: parse(["--base", str(tmp_path / "changed.yaml")]))
    assert parsed is None or SECRET not in repr(parsed.container)


PROCESS = DiscreteDiffusion(make_alphas_cumprod(**SCHEDULE))
CONCEPT = {
    "root": "photos",
    "identifier": "sks",
    "class_word": "dog",
    "name": "rex",
    "weight": 1,
    "subject_prompt": "a photo of {identifier} {class_word}",
    "prior_prompt": "a photo of a {class_word}",
    "prior_root": None,
}
OTHER = CONCEPT | {"identifier": "qpv", "name": "tom"}
changes = st.dictionaries(st.sampled_from(sorted(CONCEPT)) | st.text(max_size=5), odd, max_size=2)


def concepts_are_taken(concepts: object, folder: Path) -> bool:
    """A run of these concepts, whose folder of photos is there, is checked as before any work."""
    if not (folder / "photos").exists():
        photos(folder / "photos")
    one = dict.fromkeys(("subject_root", "class_word", "identifier"))
    config = {"data": {"params": one | {"concepts": concepts}}}
    (folder / "concepts.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    words = ["--base", str(ROOT / "configs/dreambooth.yaml"), str(folder / "concepts.yaml")]
    instantiate(parse(words).data).check()
    return True


@examples(6)
@given(changed=st.lists(changes | odd, min_size=1, max_size=2) | odd)
def test_any_concepts(changed: object, workdir: Path):
    """Several that are told apart, each with up to two keys changed."""
    own = [CONCEPT, OTHER]
    concepts = (
        [concept | one if isinstance(one, dict) else one for concept, one in zip(own, changed, strict=False)]
        if isinstance(changed, list)
        else changed
    )
    refused_or(lambda: concepts_are_taken(concepts, workdir))


def test_concepts_that_are_not_odd_are_taken(workdir: Path):
    """So that what is refused is refused for what is odd of it."""
    assert refused_or(lambda: concepts_are_taken([CONCEPT, OTHER], workdir))


TARGETS = [
    "ldm.optim.lion.Lion",
    "torch.optim.SGD",
    "torch.optim.lr_scheduler.ExponentialLR",
    "os.system",
    "ldm",
    "",
]
TARGETS += [
    "ldm.optim.schedules.Cosine",
    "ldm.diffusion.samplers.ddim",
    "ldm.runs.job.run_job",
    "torch.optim.Adam.",
]
nodes = st.fixed_dictionaries(
    {},
    optional={
        "target": st.sampled_from(TARGETS) | odd,
        "params": st.dictionaries(st.text(max_size=8), odd) | odd,
    },
)
PLACES = ["model.params.optimizer", "model.params.lr_schedule", "model.params.trainable.adapter"]
PLACES += [
    "priors.sampler",
    "samples.sampler",
    "samples.spacing",
    "model.params.text_encoder.params.clip_skip",
    "evaluation.params.judge_file",
]
PLACES += ["data.params.masks", "model.params.objective.masks", "samples.guidance_scale", "priors.steps"]


@examples(10)
@given(place=st.sampled_from(PLACES), node=nodes | odd | st.sampled_from([0, -1, 3, 10**9, "euler", "heun"]))
def test_any_node(place: str, node: object, tmp_path: Path):
    """Of optimizers, schedules, samplers and their spacing, masks and clip skips."""
    config: dict = {}
    inner = config
    *outer, last = place.split(".")
    for name in outer:
        inner = inner.setdefault(name, {})
    inner[last] = node
    (tmp_path / "node.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")

    def read() -> None:
        run = parse(["--base", str(ROOT / "configs/dreambooth.yaml"), str(tmp_path / "node.yaml")])
        for how in (run.priors, run.samples):
            sampling_levels(PROCESS, how.sampler, steps=how.steps, spacing=how.spacing)

    refused_or(read)


STUDY = yaml.safe_load((ROOT / "configs/studies/lora.yaml").read_text(encoding="utf-8"))
SEARCH = yaml.safe_load((ROOT / "configs/searches/rates.yaml").read_text(encoding="utf-8"))
ranges = st.dictionaries(st.sampled_from(["float", "log", "int", "choice", "step"]), odd, max_size=2)


def changed(data: st.DataObject, whole: dict) -> dict:
    content = copy.deepcopy(whole)
    key = data.draw(st.sampled_from(sorted(content)))
    inner = content[key]
    if isinstance(inner, dict) and data.draw(st.booleans()):
        inner[data.draw(st.sampled_from(sorted(inner)) | st.text(max_size=5) | st.integers())] = data.draw(
            odd | ranges
        )
    else:
        content[key] = data.draw(odd)
    return content


@examples(6)
@given(data=st.data())
def test_any_study(data, workdir: Path):
    Path("any.yaml").write_text(yaml.safe_dump(changed(data, STUDY), allow_unicode=True), encoding="utf-8")
    refused_or(lambda: read_sweep("any.yaml"))


@examples(6)
@given(data=st.data())
def test_any_search(data, workdir: Path):
    Path("any.yaml").write_text(yaml.safe_dump(changed(data, SEARCH), allow_unicode=True), encoding="utf-8")
    refused_or(lambda: Search.read("any.yaml", base=["configs/dreambooth.yaml"]).ranges)


def test_studies_and_searches_that_are_not_odd_are_taken(workdir: Path):
    for content, read in ((STUDY, read_sweep), (SEARCH, partial(Search.read, base=["dreambooth.yaml"]))):
        Path("any.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        assert refused_or(lambda read=read: read("any.yaml")) is not None


BAD_GRIDS = {
    "brackets": "[" * 5000,
    "a bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(k + 1)}: &{chr(k + 1)} [{','.join([f'*{chr(k)}'] * 9)}]\n" for k in range(97, 106)),
    "an object": "title: !!python/object/apply:os.system ['true']\n",
    "a circle": "title: &a [*a]\n",
    "numbers as names": "{1: 2, 3.5: null}",
}


@pytest.mark.parametrize("what", BAD_GRIDS)
def test_bad_studies_and_searches_are_refused(what: str, workdir: Path):
    Path("bad.yaml").write_text(BAD_GRIDS[what])
    assert refused_or(lambda: jobs_of(read_sweep("bad.yaml"))) is None
    assert refused_or(lambda: Search.read("bad.yaml", base=["x"])) is None


PARSERS: dict[str, Callable] = {
    "caption": caption.parse,
    "check_photos": check_photos.parse,
    "convert": convert.parse,
    "dreambench": dreambench.parse,
    "evaluate": evaluate.parse,
    "make_masks": make_masks.parse,
    "publish": publish.parse,
    "sample": sample.parse,
    "search": search.parse,
    "study": study.parse,
}
OPTIONS = [
    "--model",
    "--prompt",
    "--steps",
    "--seed",
    "--size",
    "--lora",
    "--clip_skip",
    "--sampler",
    "--spacing",
]
OPTIONS += [
    "--extract_lora",
    "--rank",
    "--to",
    "--base",
    "--root",
    "--images",
    "--batch_size",
    "--precision",
    "--",
]
words = st.lists(
    st.sampled_from(OPTIONS)
    | st.text(max_size=5)
    | st.sampled_from(["0", "-1", "1e9", "²", "9" * 5000, "a=b"]),
    max_size=5,
)


@examples(30)
@given(command=st.sampled_from(sorted(PARSERS)), given_words=words)
def test_any_words_of_a_command(command: str, given_words: list[str], capsys: pytest.CaptureFixture):
    try:
        refused_or(lambda: PARSERS[command](given_words))
    except SystemExit as error:  # argparse's own sentence
        assert error.code in (0, 2)
    capsys.readouterr()


ids = st.text("abC0/._-@:+\n ", max_size=20) | st.sampled_from(
    [
        "a/b",
        "a/b@main",
        "a/b:fp16",
        "../..",
        "a/..",
        "a/b@../../x",
        "a/b:../../x.ckpt",
        "a/b@:",
        "a/b\n",
        "/etc/passwd",
    ]
)


@examples(40)
@given(name=ids)
def test_any_id_of_the_hub(name: str, workdir: Path, monkeypatch: pytest.MonkeyPatch):
    """What an id names lies in the hub's folder, and nowhere else."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(workdir / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workdir / "hub" / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = HubModel.of(name)
    if model is not None:
        inside = (workdir / "hub" / "dreambooth").resolve()
        assert inside in model.folder.resolve().parents
        assert model.file is None or inside in (model.folder / model.file).resolve().parents
    refused_or(lambda: local_path(name))
    refused_or(lambda: check_target(name))
    assert {path.name for path in workdir.iterdir()} <= {"hub"}


def test_every_command_has_a_parser():
    """Those of configs have one in common, `ldm.runs.options.parse`, which other tests try."""
    modules = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__", "entry"}
    found = {name for name in modules if hasattr(importlib.import_module(f"ldm.commands.{name}"), "parse")}
    assert set(PARSERS) == found and modules - found == {"dreambooth", "generate_priors"}
