"""main.py on several concepts: two subjects and a style, from a config to the report."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.config import instantiate
from ldm.errors import UserError
from ldm.runs.generate_set import generate_set
from ldm.runs.inputs import read_inputs
from ldm.runs.job import run_job
from ldm.runs.options import parse
from ldm.storybook.subjects import new_subject, write_subject
from tests.factories import photos, with_concepts

ROOT = Path(__file__).resolve().parents[2]
JUDGED = [
    "evaluation.target=ldm.evaluation.storybook.StorybookEvaluation",
    "evaluation.params={seeds: 1, class_samples: 2, steps: 1, batch_size: 16}",
]


@pytest.fixture
def several(words: list[str], workdir: Path) -> list[str]:
    return [*words, with_concepts("tiny.yaml", photos(workdir / "rings")), "trainer.max_steps=2"]


def test_a_run_of_two_subjects_and_a_style(several: list[str]):
    prompts = ["a photo of {identifier} {class_word}", "a photo of a {class_word}", "{identifier}"]
    words = [*several, f"samples.prompts={prompts}", "trainer.max_steps=4"]
    folders = generate_set(parse(words))
    assert [folder.name[:17] for folder in folders] == ["a-photo-of-a-disc", "a-photo-of-a-ring"]
    assert all(len(list(folder.glob("*.png"))) == 3 for folder in folders)
    paths = run_job(parse(words))
    assert all(path.exists() for path in paths)
    folder = Path("logs/one")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["prior_images"] == 6
    page = (folder / "report.html").read_text(encoding="utf-8")
    for text in (
        "<h3>sks disc</h3>",
        "<h3>style</h3>",
        "a photo of zwx ring",
        "<figcaption>qpv</figcaption>",
    ):
        assert text in page
    names = {f"{name}/{k}.{suffix}" for name in ("sks disc", "zwx ring", "style")
             for k, suffix in enumerate(("png", "jpg", "png", "webp"))}  # fmt: skip
    assert set(read_inputs(folder).photos) == names
    with safe_open(folder / "model.safetensors", "pt") as file:
        about = file.metadata()
    assert about["modelspec.trigger_phrase"] == "sks disc, zwx ring, qpv"
    assert str(Path.cwd()) not in json.dumps(about)  # no path of this machine
    assert json.loads(about["ldm.training"])["data"]["params"]["concepts"][1]["class_word"] == "ring"

    run_job(parse([*words, "name=stopped", "trainer.max_steps=3"]))
    resumed = parse([*words, "name=stopped"])
    run_job(resumed, "logs/stopped", allow_config_change=True)
    whole, again = (load_file(f"logs/{name}/model.safetensors") for name in ("one", "stopped"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    (Path("rings") / "0.png").write_bytes((Path("rings") / "2.png").read_bytes())
    with pytest.raises(UserError, match="photos have changed.*changed zwx ring/0.png, style/0.png"):
        run_job(resumed, "logs/stopped")


def test_metrics_of_each_and_the_bleeding_matrix_on_the_report(words: list[str], workdir: Path):
    for word, seed in (("dog", 4401), ("cat", 53)):
        write_subject(workdir / word, new_subject(word, seed=seed), photos=2)
    concepts = [{"root": w, "identifier": i, "class_word": w} for w, i in (("dog", "sks"), ("cat", "zwx"))]
    data = "data.params={subject_root: null, class_word: null, size: 64, num_priors: 0}"
    words += [data, f"data.params.concepts={concepts}", "samples.prompts=[]", "online_eval={every_steps: 1}"]
    run_job(parse([*words, *JUDGED, "trainer.max_steps=1", "trainer.val_check_interval=1"]))
    metrics = json.loads(Path("logs/one/metrics.json").read_text())
    each = metrics["concepts"]
    assert each.keys() == {"sks dog", "zwx cat"}
    for key in ("subject_fidelity", "class_shift", "bleeding"):
        assert metrics[key] == pytest.approx(sum(own[key] for own in each.values()) / 2, abs=1e-4)
    assert metrics["measures"][0].keys() >= {"score", "bleeding", "subject_fidelity"}
    page = Path("logs/one/report.html").read_text(encoding="utf-8")
    assert "<h2>Each subject</h2>" in page and "<h2>Bleeding</h2>" in page
    matrix = metrics["bleeding_matrix"]
    asked, drawn = "zwx cat", "sks dog"
    cell = f"<td>{matrix['trained'][asked][drawn]:.2f} ({matrix['base'][asked][drawn]:.2f})</td>"
    assert f'<th scope="row">{asked}</th>{cell}' in page


@pytest.mark.parametrize(
    "word, message",
    [
        ("data.params.subject_root=rings", "`subject_root` is of a single subject"),
        ("--class_word=disc", "`class_word` is of a single subject"),
        (
            "model.params.trainable.learned_token={target: ldm.training.techniques.LearnedToken, "
            "params: {word: <x>, init: disc}}",
            "One new word cannot name the 3 concepts.*learned_token",
        ),
        ("data.params.concepts.1.root=absent", "no such folder.*absent"),
        ("data.params.concepts.1.identifier=sks", '"sks" is the identifier of 2 concepts'),
        ("samples.prompts=['a {thing}']", "Unknown placeholder.*samples.prompts.0"),
        ("export.weights=best", "online evaluation"),
    ],
)
def test_bad_input_is_found_before_any_work(several: list[str], word: str, message: str):
    with pytest.raises(UserError, match=message):
        run_job(parse([*several, word]))
    assert not Path("logs").exists() and not Path("priors").exists()


def test_the_config_of_the_page_is_one(workdir: Path):
    """docs/subjects.md: its YAML is merged over configs/dreambooth.yaml."""
    page = (ROOT / "docs/subjects.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (workdir / "mine.yaml").write_text(block)
    data = instantiate(parse(["--base", "mine.yaml"]).data)
    assert [concept.name for concept in data.concepts] == ["sks dog", "zwx cat", "woodcut"]
    assert [known.prompt for known in data.generated_classes] == ["a photo of a dog", "a photo of a cat"]
