"""The model card of a run, and its upload to the hub, which is not reached."""

import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from ldm.commands import publish as command
from ldm.errors import UserError
from ldm.runs import publish
from ldm.runs.model_card import LICENCES, STORYBOOK, UNKNOWN, hub_id_of, licence_of, write_card
from ldm.schema import RunConfig
from tests.factories import run_config

METRICS = {
    "dino": 0.61,
    "class_shift": 0.05,
    "intervals": {"dino": [0.55, 0.66]},
    "base": {"dino": 0.3},
    "ceiling": {"dino": 0.7},
    "noise_floor": {"class_shift": 0.06},
    "peak_memory_mib": 700.0,
}


@pytest.fixture
def config(tiny_config: dict, tmp_path: Path) -> RunConfig:
    secret = tmp_path / "private"
    return RunConfig.parse(
        run_config(
            tiny_config, base=secret / "mine.ckpt", subject=secret, name="rex", trainer={"max_steps": 3}
        )
    )


def leave(folder: Path, *, architecture: str = "stable-diffusion-v1", lora: bool = False) -> Path:
    """What a run leaves, in small."""
    about = {
        "modelspec.architecture": architecture,
        "modelspec.trigger_phrase": "sks disc",
        "ldm.base_sha256": "ab" * 32,
    }
    for name in ("model.safetensors", *(["loras/rex.safetensors"] if lora else [])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.zeros(2)}, folder / name, metadata=about)
    for name in ("samples/contact_sheet.png", "checkpoints/step-1.ckpt", "config.yaml", "photos/me.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def test_the_card_says_what_was_measured_and_nothing_private(tmp_path: Path, config: RunConfig):
    path = write_card(leave(tmp_path / "rex", lora=True), config, METRICS)
    card, text = ModelCard.load(path), path.read_text(encoding="utf-8")
    assert card.data.license == "creativeml-openrail-m" and card.data.pipeline_tag == "text-to-image"
    assert card.data.instance_prompt == "sks disc" and {"dreambooth", "lora"} <= set(card.data.tags)
    assert card.data.base_model is None and "mine.ckpt" in text and "abababababab" in text
    assert str(tmp_path) not in text and "private" not in text
    assert "| dino | 0.610 | 0.550 to 0.660 | 0.300 | 0.700 |  |" in text
    assert "| class shift | 0.050 |  |  |  | 0.060 |" in text and "peak" not in text
    assert "CreativeML OpenRAIL-M" in text and "must have agreed" in text
    assert "samples/contact_sheet.png" in text and "<lora:rex:1>" in text and "learning_rate 0.001" in text
    assert re.search(r"^# rex$", text, re.M) and "\n\n\n" not in text
    bare = write_card(leave(tmp_path / "bare"), config, {"seconds": {}}).read_text(encoding="utf-8")
    unjudged = {"seconds": {}, "notes": ["The judge cannot read these", "So there are no metrics"]}
    said = write_card(leave(tmp_path / "said"), config, unjudged).read_text(encoding="utf-8")
    assert "Nothing. The judge cannot read these. So there are no metrics." in said
    assert "Nothing. The run had no evaluation." in bare and "A fine-tune of" in bare


def test_every_base_has_a_licence_or_the_card_says_that_it_is_not_known(config: RunConfig):
    for architecture, licence in LICENCES.items():
        assert licence_of(config, {"modelspec.architecture": architecture}) == licence
        assert "restricts" in licence.text and "https://" in licence.text
    assert (
        licence_of(config, {"modelspec.architecture": "latent-diffusion"})
        == licence_of(config, {})
        == UNKNOWN
    )
    shipped = replace(config, base_checkpoint="ldm/storybook/assets/base.safetensors")
    assert licence_of(shipped, {}) == STORYBOOK


@pytest.mark.parametrize(
    "base, found",
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("./folder", None),
        ("models/sd.safetensors", None),
        ("a/b/c", None),
        ("/abs", None),
        ("sd15", None),
        ("", None),
        (None, None),
    ],
)
def test_a_hub_id_is_known_from_a_path(base: str | None, found: str | None):
    assert hub_id_of(base) == found


def test_without_yes_it_only_says_what_it_would_do(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(publish, "HfApi", None)  # any use of it fails
    folder = leave(tmp_path / "rex", lora=True)
    options = command.parse([str(folder), "--to", "me/rex"])
    with pytest.raises(UserError, match="no model card"):
        command.main(options)
    write_card(folder, config, METRICS)
    command.main(options)
    said = capsys.readouterr().out
    assert "me/rex (private)" in said and "Nothing was uploaded" in said
    listed = [line.split()[0] for line in said.splitlines() if line.startswith("  ")]
    assert listed == ["README.md", "model.safetensors", "loras/rex.safetensors", "samples/contact_sheet.png"]
    command.main(command.parse([str(folder), "--to", "me/rex", "--lora_only"]))
    assert "model.safetensors" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no LoRA"):
        alone = leave(tmp_path / "alone")
        write_card(alone, config, METRICS)
        command.main(command.parse([str(alone), "--to", "me/rex", "--lora_only"]))


@pytest.mark.parametrize("name", ["rex", "me/rex/x", "me rex/x", "/rex", ""])
def test_a_wrong_name_is_refused(name: str):
    with pytest.raises(UserError, match="no name on the hub.*user/name"):
        publish.check_target(name)


def test_yes_uploads_in_one_commit_and_errors_are_one_sentence(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    done: list[tuple] = []

    class Api:
        def create_repo(self, to: str, **how: object) -> None:
            done.append((to, how))

        def create_commit(self, to: str, operations: list, *, commit_message: str) -> Namespace:
            done.append((to, [operation.path_in_repo for operation in operations]))
            return Namespace(commit_url=f"https://huggingface.co/{to}/commit/1")

    folder = leave(tmp_path / "rex")
    write_card(folder, config, METRICS)
    monkeypatch.setattr(publish, "HfApi", Api)
    command.main(command.parse([str(folder), "--to", "me/rex", "--yes", "--public"]))
    assert done == [
        ("me/rex", {"private": False, "exist_ok": True}),
        ("me/rex", ["README.md", "model.safetensors", "samples/contact_sheet.png"]),
    ]
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/rex/commit/1\n")
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"The hub .*\(me/rex\)"):
        command.main(command.parse([str(folder), "--to", "me/rex", "--yes"]))
