"""A run with masks: one key asks for them, its inputs hold them, what cannot end well is refused before."""

from pathlib import Path

import pytest
from PIL import Image

from ldm.config import instantiate
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.errors import UserError
from ldm.runs.inputs import keep_inputs, read_inputs
from ldm.runs.options import parse
from ldm.runs.sweep import read_sweep
from ldm.runs.validate import validate
from tests.factories import masks

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = "model.params.objective.masks={outside: 0.1}"
TEACHER = "model.params.objective.masks={outside: 1, outside_target: teacher}"
LORA = "model.params.trainable.lora={target: ldm.models.lora.LoRA, params: {rank: 2}}"
NODE = "{target: ldm.training.techniques.LearnedToken, params: {word: <my-disc>, init: disc}}"
WORD = [f"model.params.trainable.learned_token={NODE}", "data.params.identifier=<my-disc>"]


def test_the_objectives_key_asks_for_the_masks(words: list[str], subject_folder: Path):
    masks(subject_folder)
    config = parse([*words, OUTSIDE])
    validate(config)
    module, data = instantiate(config.model), instantiate(config.data)
    assert module.objective.masks.outside == 0.1 and data.masks and len(data.mask_files) == 4
    assert "masks" not in config.container["data"]["params"]
    plain = instantiate(parse(words).data)
    assert not plain.masks and plain.mask_files == {} and len(plain.subject_photos) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([OUTSIDE, "data.params.masks=false"], r"`masks` is False here and True for the run"),
        (["data.params.masks=true"], r"no loss that uses them.*data\.params\.masks"),
        (["data.params.mask_root=masks"], r"no loss that uses them.*data\.params\.mask_root"),
        (["model.params.objective.masks={outside: -1}"], r"-1 .*at least 0"),
        (["model.params.objective.masks={outside: 1, outside_target: base}"], "'base'.*noise, teacher"),
        (["model.params.objective.masks={outside_target: teacher}"], "outside"),
        ([TEACHER.replace("1,", "0,")], r"has no weight.*objective\.masks\.outside"),
        ([TEACHER, LORA, *WORD], r"teacher would read the learned token as it is trained"),
    ],
)
def test_what_masks_cannot_do_is_refused(
    words: list[str], subject_folder: Path, overrides: list[str], message: str
):
    masks(subject_folder)
    with pytest.raises(UserError, match=message):
        validate(parse([*words, *overrides]))


def test_missing_masks_are_refused_before_any_work(words: list[str], subject_folder: Path):
    with pytest.raises(UserError, match=r"4 of 4 photos have no mask: 0\.png, 1\.jpg, 2\.png, 3\.webp"):
        validate(parse([*words, OUTSIDE]))
    assert not Path("logs").exists()


def test_a_run_goes_on_with_the_masks_that_it_began_with(subject_folder: Path, tmp_path: Path):
    masks(subject_folder)
    (tmp_path / "run").mkdir()

    def begin(*, allow: bool = False) -> None:
        data = DreamBoothDataModule(subject_root=str(subject_folder), class_word="disc", size=8, masks=True)
        keep_inputs(tmp_path / "run", data, {}, allow_change=allow)

    begin()
    assert sorted(read_inputs(tmp_path / "run").masks) == [f"{k}.mask.png" for k in range(4)]
    assert sorted(read_inputs(tmp_path / "run").photos) == ["0.png", "1.jpg", "2.png", "3.webp"]
    begin()
    Image.new("L", (32, 32), 255).save(subject_folder / "2.mask.png")
    with pytest.raises(UserError, match=r"masks of the subject's photos have changed.*changed 2\.mask\.png"):
        begin()
    begin(allow=True)


def test_the_arms_of_the_study_of_masks_are_masked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    sweep = read_sweep("configs/studies/masks.yaml")
    jobs = {name: sweep.job(name, "dog", 23, overrides) for name, overrides in sweep.variants.items()}
    masked = [job.config.data["params"].get("masks", False) for job in jobs.values()]
    assert masked == [False, True, True, True]
    validate(jobs["teacher outside"].config)
