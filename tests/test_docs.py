"""What README and docs say to type can be typed, and what they link to is there."""

import json
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from PIL import Image

import ldm
from ldm.commands import dreambooth
from ldm.errors import UserError
from ldm.runs.command import read_command
from ldm.storybook import subjects

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"config.md", "errors.md"}
LINKED = ("*.md", "docs/*.md", "docs/*.ipynb", "benchmarks/*.md", "studies/*.md", "ldm/*/README.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS = PROJECT["project"]["scripts"]


def commands_of(page: Path) -> list[str]:
    """The lines of a page's blocks of commands (without a language), each a command."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    commands = [block.replace("\\\n", " ") for language, block in blocks if not language]
    lines = [line for block in commands for line in block.splitlines()]
    return [re.sub(r"\s+", " ", line.partition("   #")[0]).strip() for line in lines if line.strip()]


ALL = sorted({command: page.name for page in PAGES for command in commands_of(page)}.items())


@pytest.fixture
def stand_ins(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photos and files of the names that the pages give; what a run needs is not computed."""
    for folder in ("photos", "mycat", "samples", "dogs"):
        Path(folder).mkdir()
        Image.effect_noise((512, 512), 50).convert("RGB").save(f"{folder}/01.png")
    for base in ("sd15", "sdxl"):
        Path(base).mkdir()
    Path("sd15/v1-5-pruned-emaonly.safetensors").touch()
    monkeypatch.setattr("ldm.runs.run.hub_models", lambda bases: {})  # nothing is asked of the network
    monkeypatch.setattr("ldm.runs.validate._check_bases", lambda *given, **how: None)
    monkeypatch.setattr("ldm.runs.disk.require_space", lambda *given, **how: None)  # nothing is written
    monkeypatch.setattr("ldm.runs.job.estimate", lambda config: ({}, {}))
    monkeypatch.setattr("ldm.runs.job.encoding", lambda config: 0)
    monkeypatch.setattr("ldm.runs.job.with_checkpointing_chosen", lambda config, device: config)
    return workdir


def try_main(words: list[str]) -> None:
    """A dry run; a page on a class of one's own has a test of its own."""
    if "--allow" in words:
        assert read_command(words, description=None).allow
    else:
        assert dreambooth.main([*words, "--dry_run"]) == 0


def try_install(words: list[str]) -> None:
    """Extras and files of an installation are there."""
    for word in words:
        extras = re.search(r"\.\[(.+)\]", word)
        assert not extras or set(extras[1].split(",")) <= PROJECT["project"]["optional-dependencies"].keys()
        assert not word.endswith(".txt") or (ROOT / word).exists()


@pytest.mark.parametrize("command, page", ALL)
def test_a_command_of_a_page_can_be_typed(command: str, page: str, stand_ins: Path):
    words = shlex.split(command.removeprefix("PYTHONPATH=. "))
    program, rest = Path(words[0]).name, words[1:]
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif program == "pip" or rest[:2] == ["-m", "venv"]:
        try_install(rest)
    elif program in COMMANDS:
        import_module(COMMANDS[program].partition(":")[0])
    elif program == "python" and rest[0] == "main.py":
        try_main(rest[1:])
    elif program == "python" and rest[:2] == ["-m", "ldm.storybook.subjects"]:
        subjects.main(rest[2:])
    elif program == "python" and rest[0].startswith("scripts/"):
        assert (ROOT / rest[0]).exists()
        try_script(Path(rest[0]).stem, rest[1:])
    else:
        pytest.fail(f"{page}: this test does not know how to try `{command}`")


def try_script(name: str, words: list[str]) -> None:
    """The options of a script are parsed, and configs that they name ship."""
    if name != "benchmark" and name != "soak":
        module = import_module(f"ldm.commands.{name}")
        module.parse(words) if hasattr(module, "parse") else read_command(words, description=None)
    for word in words:
        assert not word.startswith("configs/") or (ROOT / word).exists(), word


def test_there_are_commands_and_a_wrong_one_is_seen(stand_ins: Path, capsys: pytest.CaptureFixture):
    assert len(ALL) > 25
    with pytest.raises(AssertionError):
        try_main(["--base", "configs/dreambooth.yaml", "trainer.max_step=3"])
    assert "max_steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        try_script("sample", ["--promt", "a dog"])
    with pytest.raises((UserError, AssertionError)):
        try_main(["--base", "configs/dreambooth.yaml", "--data_root", "nowhere"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_of_a_page_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for link, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)):
        if link.startswith("http"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, link
    if page.name not in GENERATED:
        paths = re.findall(r"`((?:configs|scripts|ldm|docs)/[\w./-]+\.\w+)`", text)
        assert [path for path in paths if not (ROOT / path).exists()] == []


def known_keys() -> set[str]:
    """Every key of docs/config.md, dotted."""
    keys, section = set(), ""
    for line in (ROOT / "docs/config.md").read_text(encoding="utf-8").splitlines():
        if head := re.match(r"## `([\w.]+)`", line):
            section = head[1] + "."
        elif line.startswith("## "):
            section = ""
        elif row := re.match(r"\| `(\w+)` \|", line):
            keys |= {section + row[1], section.rstrip(".")}
    return keys


SECTIONS = "model.params|data.params|trainer|samples|priors|online_eval|export"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in GENERATED], ids=lambda page: page.name)
def test_keys_that_a_page_names_are_keys(page: Path):
    named = set(re.findall(rf"`((?:{SECTIONS})(?:\.\w+)+)", page.read_text(encoding="utf-8")))
    inner = {key for key in named if re.match(r"model\.params\.(unet|vae|text_encoder)\.", key)}
    assert named - inner - known_keys() - {"samples.md", "data.params"} == set()


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110 and max(map(len, lines)) <= 300


def test_the_citation_is_of_this_version():
    """CITATION.cff has what its format requires, and the version of the package and of CHANGELOG.md."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["version"] == PROJECT["project"]["version"] == ldm.__version__
    assert f"\n## {cited['version']}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for paper in cited["references"]:
        assert {"type", "title", "authors", "year"} <= paper.keys()
        assert paper["url"] in (ROOT / "docs/method.md").read_text(encoding="utf-8")


def test_every_page_is_linked_from_another():
    """A reader who begins at README.md gets to every page."""
    found, at = set(), [ROOT / "README.md"]
    while at:
        page = at.pop()
        for link in re.findall(r"\]\(([^)#\s]+\.(?:md|ipynb))[^)]*\)", page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            if not link.startswith("http") and target not in found:
                found.add(target)
                at.append(target)
    pages = {path for place in LINKED for path in ROOT.glob(place)}
    assert len(pages) > 40 and sorted(pages - found - {ROOT / "README.md"}) == []


def test_the_notebook_runs(workdir: Path, capsys: pytest.CaptureFixture):
    """Every code cell, in order, in one namespace, as Jupyter would."""
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    namespace: dict = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)  # noqa: S102
    run = namespace["run"]
    assert run.report.exists() and run.model.exists() and run.metrics["seconds"]["training"] > 0
    assert [sample.image.size for sample in namespace["samples"]] == [(64, 64)] * 2
