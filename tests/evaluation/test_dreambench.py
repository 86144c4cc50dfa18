"""DreamBench: the dataset as it is published, its metrics by hand, and the command on tiny networks."""

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from ldm.commands import dreambench
from ldm.config import save_config
from ldm.contact_sheet import save_image
from ldm.errors import UserError
from ldm.evaluation.dreambench import METRICS, PAPER, BenchMetrics, read_dataset
from ldm.evaluation.features import DinoV2
from ldm.evaluation.masc import CP
from ldm.reports.dreambench_page import table_of
from ldm.runs import dreambench_results
from ldm.runs.dreambench import MEASURED, given_images, not_the_protocol
from ldm.runs.grid import Job, metrics_of
from tests.data.test_photo_check import noise
from tests.data.test_real_photos import ROOT as REAL
from tests.data.test_real_photos import SUBJECTS
from tests.evaluation.test_photos import networks as photo_networks  # noqa: F401
from tests.factories import photos, run_config

LISTS = """Classes

subject_name,class
tin_can,can
disc,disc
dog,dog
wolf_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
"a {0} {1} in a dog's house".format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


@pytest.fixture(scope="module")
def networks(photo_networks: dict[str, str], tmp_path_factory) -> dict[str, str]:  # noqa: F811
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return {**photo_networks, "dinov2": str(folder)}


@pytest.fixture
def root(workdir: Path) -> Path:
    """A dataset of three subjects; the folder of the fourth is not there."""
    folder = workdir / "dataset"
    folder.mkdir()
    (folder / "prompts_and_classes.txt").write_text(LISTS)
    for name in ("disc", "dog", "wolf_plushie"):
        photos(folder / name)
    return folder


def test_the_list_is_read_as_it_is_published(root):
    disc, dog, wolf = read_dataset(root)
    assert (disc.name, disc.class_word, disc.photos) == ("disc", "disc", root / "disc")
    assert disc.prompts("sks") == ["a sks disc in the jungle", "a sks disc in a dog's house"]
    assert dog.prompts("zwx") == ["a zwx dog wearing a red hat"]
    assert wolf.prompts("sks")[0] == "a sks stuffed animal in the jungle"


@pytest.mark.parametrize(
    ("spoil", "said"),
    {
        lambda root: (root / "prompts_and_classes.txt").unlink(): "has no prompts_and_classes.txt",
        lambda root: (root / "prompts_and_classes.txt").write_text("x"): "no classes or prompts",
        lambda root: [
            shutil.rmtree(root / name) for name in ("disc", "dog", "wolf_plushie")
        ]: "no folder of photos",
    }.items(),
)
def test_another_folder_is_refused(root, spoil, said):
    spoil(root)
    with pytest.raises(UserError, match=said):
        read_dataset(root)


@pytest.mark.skipif(not SUBJECTS, reason=f"no photos under {REAL}")
def test_the_real_list_has_25_prompts_each():
    found = {subject.name: subject for subject in read_dataset(REAL)}
    assert list(found) == ["backpack", "cat", "dog", "teapot", "vase"]
    assert {len(subject.templates) for subject in found.values()} == {25}
    assert "a sks cat wearing a red hat" in found["cat"].prompts("sks")
    assert "a sks vase on top of a mirror" in found["vase"].prompts("sks")


def test_the_metrics_are_means_over_pairs_and_prompts(networks):
    measure = BenchMetrics(**networks)
    photos, images = (
        [noise(1), noise(2), noise(3)],
        {"a sks dog": [noise(4), noise(5)], "a sks cat": [noise(6)]},
    )
    found = measure(images, photos, identifier="sks")
    every = [noise(4), noise(5), noise(6)]
    for name, network in {"dino": measure.dino, "dinov2": measure.dinov2, "clip_i": measure.clip}.items():
        rows, own = network.embed_images(every), network.embed_images(photos)
        pairs = [float(row @ other) for row in rows for other in own]
        assert found[name] == pytest.approx(sum(pairs) / 9, abs=1e-6)
        among = [float(own[i] @ own[j]) for i in range(3) for j in range(3) if i != j]
        assert found[f"photos_{name}"] == pytest.approx(sum(among) / 6, abs=1e-6)
    dog, cat = measure.clip.embed_texts(["a dog", "a cat"])
    rows = measure.clip.embed_images(every)
    by_hand = (rows[0] @ dog + rows[1] @ dog + rows[2] @ cat) / 3
    assert found["clip_t"] == pytest.approx(float(by_hand), abs=1e-6)
    assert found["clip_t"] != pytest.approx(
        float((rows[0] @ dog + rows[1] @ cat + rows[2] @ cat) / 3), abs=1e-5
    )


def test_dinov2_is_the_token_after_the_last_norm(networks):
    network = DinoV2(networks["dinov2"])
    features = network.embed_images([noise(1), noise(2)])
    assert features.shape == (2, 32) and torch.allclose(features.norm(dim=1), torch.ones(2))
    with pytest.raises(UserError, match="hf download facebook/dinov2-base"):
        DinoV2("absent/dinov2")


def test_the_prompt_of_any_tools_image_is_found(tmp_path):
    prompts = [f"prompt {k}" for k in range(12)]
    for name in ("07-2.png", "11/0.png", "03_x.png", "other.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise(1).save(tmp_path / name)
    (tmp_path / "other.txt").write_text("a sks dog by the sea")
    found = {prompt: len(group) for prompt, group in given_images(tmp_path, prompts).items()}
    assert found == {"prompt 3": 1, "prompt 7": 1, "a sks dog by the sea": 1, "prompt 11": 1}
    save_image(
        tmp_path / "contact_sheet.png", noise(1), {"prompts": prompts}
    )  # of sample.py, no image of one
    assert {prompt: len(group) for prompt, group in given_images(tmp_path, prompts).items()} == found
    for name in ("12-0.png", "x.png"):
        noise(1).save(tmp_path / name)
        with pytest.raises(UserError, match=f"not known which prompt.*{name}.*00 to 11"):
            given_images(tmp_path, prompts)
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="no images of the subject"):
        given_images(tmp_path / "absent", prompts)


def test_the_paper_stands_beside():
    rows = [
        {"variant": MEASURED, "subject": str(k), "seed": 0, "images": 8, "photos_dino": 0.5}
        | dict.fromkeys(METRICS, k / 10)
        for k in range(6)
    ]
    table = dict(table_of(rows))
    assert table["Measured here"][0].startswith("0.250 (") and table["These photos with one another"][2:] == [
        "",
        "",
    ]
    assert table["DreamBooth, Stable Diffusion"] == ["0.668", "0.803", "0.305", ""]
    assert list(table)[2:] == list(PAPER)
    assert not_the_protocol(rows) == [
        "the paper has 30 subjects, here are 6",
        "the paper has 100 images of each, here are 8",
    ]


def run(words: list[str]) -> None:
    dreambench.main(dreambench.parse(words))


def test_the_command_trains_draws_measures_and_goes_on(root, networks, tiny_config, tiny_model_file, capsys):
    config = run_config(
        tiny_config,
        base=tiny_model_file,
        subject=root,
        name="x",
        trainer={"max_steps": 1},
        samples={"steps": 1},
    )
    OmegaConf.save(OmegaConf.create(config), "tiny.yaml")
    words = ["--root", str(root), "--subjects", "disc", "dog", "--images", "2", "--device", "cpu"]
    words += [word for name, folder in networks.items() for word in (f"--{name}", folder)]
    run([*words, "--base", "tiny.yaml", "data.params.num_priors=1"])
    folder = Path("logs/dreambench-tiny")
    drawn = sorted(path.relative_to(folder).as_posix() for path in folder.glob("pictures/*/*.png"))
    assert len(drawn) == 2 * 2 + 1 * 2 and drawn[0] == "pictures/disc/00-00.png"
    lines = (folder / "dreambench.csv").read_text().splitlines()
    assert lines[0].startswith("subject,dino,clip_i,clip_t,dinov2") and len(lines) == 3
    assert "the paper has 30 subjects" in (folder / "dreambench.html").read_text()
    said = capsys.readouterr().out
    assert "DreamBooth, Stable Diffusion" in said and "subject 2 of 2: dog" in said

    first = json.loads((folder / "results/dog.json").read_text())
    (folder / "results/dog.json").unlink()
    (folder / "pictures/dog/00-01.png").unlink()
    begun = (folder / "pictures/dog/00-00.png").stat().st_mtime_ns
    run([*words, "--base", "tiny.yaml", "data.params.num_priors=1"])
    assert json.loads((folder / "results/dog.json").read_text()) == first
    assert (folder / "pictures/dog/00-00.png").stat().st_mtime_ns == begun
    assert "disc" not in capsys.readouterr().out.split("Measured")[0]

    run([*words, "--pictures", str(folder / "pictures"), "--name", "given"])
    again = json.loads(Path("logs/dreambench-given/results/dog.json").read_text())
    assert {m: again[m] for m in METRICS} == {m: first[m] for m in METRICS}

    others = [*words, "--subjects", "dog", "--base", "tiny.yaml", "data.params.num_priors=2"]
    with pytest.raises(UserError, match="settings have changed.*Remove the run's folder"):
        run(others)
    shutil.rmtree(folder / "dreambooth--dog--23")
    run(others)
    anew = json.loads((folder / "results/dog.json").read_text())
    assert {m: anew[m] for m in METRICS} != {m: first[m] for m in METRICS}
    assert (folder / "pictures/dog/00-00.png").stat().st_mtime_ns != begun


def test_what_cannot_be_measured_is_refused_before_any_work(root, networks, tiny_config, tiny_model_file):
    words = ["--root", str(root), "--device", "cpu"]
    with pytest.raises(UserError, match="nothing to measure"):
        run(words)
    with pytest.raises(UserError, match="no subject cow.*disc, dog, wolf_plushie"):
        run([*words, "--base", "x.yaml", "--subjects", "cow"])
    for name in ("disc", "dog"):
        (root / "given" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / "given" / name / "00.png")
    with pytest.raises(UserError, match="no images of the subject.*wolf_plushie"):
        run([*words, "--pictures", str(root / "given")])


class Counted:
    """Stands in for training, sampling and measuring, which it counts; no two of them give the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.numbers = count()
        self.counts = [0, 0, 0]
        self.while_measuring: Callable[[], Any] = list
        monkeypatch.setattr("ldm.runs.dreambench.finish", self.finish)
        monkeypatch.setattr("ldm.runs.dreambench._pipeline", lambda job: self.sample)
        monkeypatch.setattr("ldm.runs.dreambench.validate", lambda config, **more: None)
        monkeypatch.setattr("ldm.runs.dreambench.require_masc", lambda: None)
        monkeypatch.setattr("ldm.runs.dreambench.masks_of_photos", lambda folder: {})
        monkeypatch.setattr(dreambench_results, "BenchMetrics", lambda **names: self.measure)
        masked = lambda network, device: lambda images, photos: {CP: 0.5}  # noqa: E731
        monkeypatch.setattr(dreambench_results, "MaskedConsistency", masked)

    def finish(self, job: Job) -> None:
        if metrics_of(job) is None:
            self.counts[0] += 1
            job.folder.mkdir(parents=True)
            save_config(job.config.source, job.folder / "config.yaml")
            metrics = {"seconds": {"training": 9.5 + next(self.numbers)}}
            (job.folder / "metrics.json").write_text(json.dumps(metrics))

    def sample(self, prompts: list[str], **how: Any) -> list[SimpleNamespace]:
        self.counts[1] += len(prompts)
        return [SimpleNamespace(image=noise(next(self.numbers))) for _ in prompts]

    def measure(self, images: Any, photos: Any, *, identifier: str) -> dict[str, float]:
        self.counts[2] += 1
        self.while_measuring()
        return dict.fromkeys(METRICS, float(next(self.numbers)))

    def __call__(self, words: list[str]) -> list[int]:
        """Runs the command -> how many runs it has trained, images drawn, subjects measured."""
        self.counts = [0, 0, 0]
        run(words)
        return self.counts


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def own(root, tiny_config, tiny_model_file) -> list[str]:
    """The words of a benchmark of this trainer: a subject with two prompts of two images."""
    about = {"name": "x", "trainer": {"max_steps": 1}, "samples": {"steps": 1, "batch_size": 3}}
    config = run_config(tiny_config, base=tiny_model_file, subject=root, **about)
    OmegaConf.save(OmegaConf.create(config), "tiny.yaml")
    return [*one_subject(root), "--base", "tiny.yaml"]


def one_subject(root: Path) -> list[str]:
    (root / "clip").mkdir()
    (root / "clip" / "config.json").write_text("{}")
    words = ["--subjects", "disc", "--images", "2", "--device", "cpu", "--clip", str(root / "clip")]
    return ["--root", str(root), *words]


def remove_run(root: Path) -> None:
    shutil.rmtree("logs/dreambench-tiny/dreambooth--disc--23")


def edit_prompt(root: Path) -> None:
    path = root / "prompts_and_classes.txt"
    path.write_text(path.read_text().replace("in the jungle", "on the moon"))


def edit_network(root: Path) -> None:
    (root / "clip" / "config.json").write_text("[]")


def edit_row(root: Path) -> None:
    """As rows were written before they had a key."""
    path = Path("logs/dreambench-tiny/results/disc.json")
    row = json.loads(path.read_text())
    del row["key"]
    path.write_text(json.dumps(row))


def edit_picture(root: Path) -> None:
    """As images were written before they named their run."""
    path = Path("logs/dreambench-tiny/pictures/disc/01-01.png")
    noise(99).save(path)


OWN = {  # words that are added, what is changed -> runs trained, images drawn, subjects measured
    "nothing": ([], None, [0, 0, 0]),
    "the runs' seed": (["--seed", "24"], None, [1, 4, 1]),
    "more images": (["--images", "3"], None, [0, 2, 1]),
    "fewer images": (["--images", "1"], None, [0, 0, 1]),
    "DINO": (["--dino", "other"], None, [0, 0, 1]),
    "DINOv2": (["--dinov2", "other"], None, [0, 0, 1]),
    "CLIP": (["--clip", "other"], None, [0, 0, 1]),
    "the files of CLIP": ([], edit_network, [0, 0, 1]),
    "masked consistency": (["--masc"], None, [0, 0, 1]),
    "a prompt": ([], edit_prompt, [0, 2, 1]),
    "the run": ([], remove_run, [1, 4, 1]),
    "the run's settings": (["--base", "tiny.yaml", "samples.seed=8"], remove_run, [1, 4, 1]),
    "the row": ([], lambda root: Path("logs/dreambench-tiny/results/disc.json").unlink(), [0, 0, 1]),
    "the row's key": ([], edit_row, [0, 0, 1]),
    "an image": ([], lambda root: Path("logs/dreambench-tiny/pictures/disc/00-01.png").unlink(), [0, 1, 1]),
    "an image's settings": ([], edit_picture, [0, 1, 1]),
}


@pytest.mark.parametrize("changed", OWN)
def test_a_row_of_a_run_is_of_all_that_decides_it(root, own, counted, changed):
    words, change, expected = OWN[changed]
    assert counted(own) == [1, 4, 1]
    if changed == "the run's settings":
        with pytest.raises(UserError, match="settings have changed.*Remove the run's folder"):
            run([*own, *words])
    if change is not None:
        change(root)
    path = Path("logs/dreambench-tiny/results/disc.json")
    before = json.loads(path.read_text()) if path.exists() else {}
    assert counted([*own, *words]) == expected
    after = json.loads(path.read_text())
    assert (after.get("dino") == before.get("dino")) == (expected == [0, 0, 0])
    assert after["images"] == len(after["key"]["prompts"]) * after["key"]["images"]
    assert counted([*own, *words]) == [0, 0, 0]


@pytest.fixture
def given(root) -> list[str]:
    """The words of a benchmark of another tool's images."""
    for tool in ("a", "b"):
        (root / tool / "samples" / "disc").mkdir(parents=True)
        noise(ord(tool)).save(root / tool / "samples" / "disc" / "00-0.png")
    return [*one_subject(root), "--pictures", str(root / "a" / "samples")]


def replace_picture(root: Path) -> None:
    noise(7).save(root / "a/samples/disc/00-0.png")


def add_picture(root: Path) -> None:
    (root / "a/samples/disc/01").mkdir()
    noise(7).save(root / "a/samples/disc/01/x.png")


def move(root: Path) -> None:
    (root / "c").mkdir()
    (root / "a/samples").rename(root / "c/samples")


GIVEN = {  # words that are added, where {root} is the dataset, what is changed -> subjects measured
    "nothing": ([], None, 0),
    "the seed of the row": (["--seed", "24"], None, 1),
    "the folder's place": (["--pictures", "{root}/c/samples"], move, 0),
    "the folder": (["--pictures", "{root}/b/samples"], None, 1),
    "an image": ([], replace_picture, 1),
    "one more image": ([], add_picture, 1),
    "an image's prompt": ([], lambda root: (root / "a/samples/disc/00-0.txt").write_text("a disc"), 1),
    "a photo": ([], lambda root: noise(8).save(next((root / "disc").iterdir()), "PNG"), 1),
    "one more photo": ([], lambda root: noise(8).save(root / "disc/more.png"), 1),
    "a prompt": ([], edit_prompt, 1),
    "DINO": (["--dino", "other"], None, 1),
    "the files of CLIP": ([], edit_network, 1),
    "masked consistency": (["--masc", "other"], None, 1),
}


@pytest.mark.parametrize("changed", GIVEN)
def test_a_row_of_another_tools_images_is_of_all_that_decides_it(root, given, counted, changed):
    words, change, measured = GIVEN[changed]
    assert counted(given) == [0, 0, 1]
    if change is not None:
        change(root)
    words = [*given, *(word.format(root=root) for word in words)]
    assert counted(words) == [0, 0, measured]
    assert counted(words) == [0, 0, 0]


def test_what_was_asked_for_before_is_kept(given, counted):
    """A row with masked consistency serves a command that does not ask for it, if it is the same network."""
    assert counted([*given, "--masc", "one"]) == [0, 0, 1]
    assert counted(given) == counted([*given, "--masc", "one"]) == [0, 0, 0]
    assert counted([*given, "--masc", "two"]) == [0, 0, 1]


def test_what_changes_while_it_is_measured_is_not_finished(root, given, counted, capsys):
    """Nor is it measured again and again by the same command."""
    counted.while_measuring = lambda: noise(next(counted.numbers)).save(root / "disc/more.png")
    assert counted(given) == [0, 0, 1]
    assert "1 of 1 subjects are still to be done: disc" in capsys.readouterr().out
    counted.while_measuring = list
    assert counted(given) == [0, 0, 1] and counted(given) == [0, 0, 0]
