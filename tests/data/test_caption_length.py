"""Captions that the text encoder reads only in part."""

import logging
from pathlib import Path

import pytest

from ldm.data.caption_length import check_lengths, prompts_of
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.errors import UserError
from ldm.models.text_encoder import CLIPTextEncoder

LONG = "a photo of a little round disc that lies on the grass"  # 42 letters for 30 places


@pytest.fixture
def encoder(tiny_networks: dict) -> CLIPTextEncoder:
    return tiny_networks["text_encoder"]


@pytest.mark.parametrize(
    "caption, cut",
    [
        ("a photo of sks disc", None),
        ("sks " + LONG, True),
        (LONG, True),
        (f"sks disc, {LONG}, sks disc", True),  # the name stands in both parts
        ("SKS disc " + LONG, True),
    ],
)
def test_what_is_cut_off_is_shown(encoder: CLIPTextEncoder, caplog, caption: str, cut: bool | None):
    with caplog.at_level(logging.INFO):
        check_lengths({"0.txt": caption}, encoder, identifiers=["sks"])
    if cut is None:
        assert not caplog.records
        return
    [record] = caplog.records
    tail = encoder.truncated_tail(caption)
    assert (
        caption.endswith(tail)
        and f'0.txt: the text encoder reads 32 tokens, so "{tail}" is' in record.message
    )


@pytest.mark.parametrize(
    "caption",
    [
        LONG + " sks disc",
        "a photo of a red and white round disc sks",  # the first letter fits
        "a photo of a red and white round dis sks",  # all but the last letter
        LONG + ", Sks",
    ],
)
def test_a_name_that_is_cut_off_is_an_error(encoder: CLIPTextEncoder, caption: str):
    with pytest.raises(
        UserError, match=r'the identifier "sks" comes after them.*\(0\.txt\).*Write it earlier'
    ):
        check_lengths({"0.txt": caption}, encoder, identifiers=["sks"])


def test_all_that_a_run_trains_on_is_looked_at(subject_folder: Path, tmp_path: Path):
    (subject_folder / "0.txt").write_text("a {identifier} {class_word}")
    (tmp_path / "discs").mkdir()
    (subject_folder / "1.jpg").rename(tmp_path / "discs/1.jpg")
    (tmp_path / "discs/1.txt").write_text("any disc")
    given = {"subject_root": str(subject_folder), "class_word": "disc", "size": 16}
    plain = {"subject_prompt": "a photo of sks disc", "prior_prompt": "a photo of a disc"}
    assert prompts_of(DreamBoothDataModule(**given)) == plain
    assert list(prompts_of(DreamBoothDataModule(**given, num_priors=0))) == ["subject_prompt"]
    own = prompts_of(DreamBoothDataModule(**given, captions=True, prior_root=str(tmp_path / "discs")))
    files = {str(subject_folder / "0.txt"): "a sks disc", str(tmp_path / "discs/1.txt"): "any disc"}
    assert own == plain | files
