"""CLIP's vocabulary as each version of transformers saves it, and where that of a run's model is found."""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from ldm.checkpoints.load import open_model
from ldm.checkpoints.save_folder import save_folder
from ldm.commands import convert
from ldm.errors import UserError
from ldm.model_file import ModelFile
from ldm.models.vocabulary import load_tokenizer
from ldm.models.vocabulary_files import FILES, WHOLE, read_vocabulary, write_vocabulary

STORYBOOK = Path(__file__).resolve().parents[2] / "ldm/storybook/assets/tokenizer"  # has merges
PROMPTS = ["a photo of sks dog on the moon", "", "zwx, 12 dogs!"]


def alone(source: Path, folder: Path) -> Path:
    """A folder with tokenizer.json and its config only."""
    CLIPTokenizer.from_pretrained(source).save_pretrained(folder)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    assert (folder / WHOLE).is_file()
    return folder


def test_tokenizer_json_is_the_same_vocabulary(tmp_path: Path):
    folder = alone(STORYBOOK, tmp_path / "alone")
    ids = load_tokenizer(str(STORYBOOK))(PROMPTS).input_ids
    assert load_tokenizer(str(folder))(PROMPTS).input_ids == ids and len(ids[0]) < len(PROMPTS[0])
    assert read_vocabulary(folder) == read_vocabulary(STORYBOOK)
    (tmp_path / "written").mkdir()
    write_vocabulary(folder, tmp_path / "written")
    assert sorted(path.name for path in (tmp_path / "written").iterdir()) == sorted(FILES)
    merges = [(at / "merges.txt").read_text().splitlines() for at in (tmp_path / "written", STORYBOOK)]
    assert merges[0] == merges[1] and len(merges[0]) > 10
    assert load_tokenizer(str(tmp_path / "written"))(PROMPTS).input_ids == ids


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "neither vocab.json and merges.txt nor tokenizer.json"), ("{", "cannot be read")]
    + [("[]", "no JSON object"), ("{}", "no vocabulary"), ('{"model": {"vocab": 3}}', "no vocabulary")],
)
def test_a_damaged_one_is_refused(content: str | None, said: str, tmp_path: Path):
    if content is not None:
        (tmp_path / WHOLE).write_text(content)
    with pytest.raises(UserError, match=f"{said}.*{tmp_path.name}"):
        read_vocabulary(tmp_path)


@pytest.fixture
def base(tiny_model_file: Path, tiny_tokenizer: Path, tmp_path: Path) -> Path:
    """A diffusers folder with tokenizer.json alone, as it is saved by transformers 5."""
    model = open_model(tiny_model_file)
    how = {"config": model.config, "tokenizer": tiny_tokenizer, "size": 16}
    folder = save_folder(tmp_path / "base", model.state_dicts, **how)
    shutil.rmtree(folder / "tokenizer")
    alone(tiny_tokenizer, folder / "tokenizer")
    return folder


def run_of(base: Path, config: dict, folder: Path, **text_encoder: object) -> Path:
    """A run's folder: its model, whose metadata name no vocabulary, and its config."""
    text = {**config["text_encoder"], "params": {**config["text_encoder"]["params"], **text_encoder}}
    params = {**config, "text_encoder": text}
    folder.mkdir()
    about = {**config, "text_encoder": {**text, "params": {**text["params"], "tokenizer": "absent/hub-id"}}}
    target = base.with_name("joined.safetensors")
    convert.main(convert.parse([str(base), str(target)]))
    save_file(load_file(target), folder / "model.safetensors", metadata={"ldm.config": json.dumps(about)})
    content = {"model": {"target": "x", "params": params}, "base_checkpoint": str(base)}
    OmegaConf.save(OmegaConf.create(content), folder / "config.yaml")
    return folder / "model.safetensors"


def tokenizes(model: Path) -> list[list[int]]:
    file = ModelFile(model, names=("text_encoder",))
    return file.networks["text_encoder"].tokenize(PROMPTS[:1]).tolist()


def test_a_runs_model_is_read_with_the_vocabulary_that_it_was_trained_with(
    base: Path, tiny_config: dict, tiny_model_file: Path, tiny_tokenizer: Path, tmp_path: Path
):
    """That of the config, where it is here, else that of the base's folder."""
    assert open_model(base).tokenizer == base / "tokenizer"
    expected = tokenizes(tiny_model_file)
    of_base = run_of(base, tiny_config, tmp_path / "one", tokenizer="absent/hub-id")
    named = run_of(base, tiny_config, tmp_path / "two")
    assert open_model(of_base).tokenizer == base / "tokenizer"
    assert open_model(named).tokenizer == Path(tiny_tokenizer)
    assert tokenizes(of_base) == tokenizes(named) == expected
    out = convert.main(convert.parse([str(of_base), str(tmp_path / "out")]))
    assert {path.name for path in (out / "tokenizer").iterdir()} >= set(FILES)
    moved = of_base.rename(tmp_path / "moved.safetensors")
    assert open_model(moved).tokenizer is None
    shutil.rmtree(base)
    of_base = moved.rename(of_base)
    assert open_model(of_base).tokenizer is None
