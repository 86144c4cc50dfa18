"""Captions that the text encoder reads only in part."""

import logging
from pathlib import Path

import pytest

from ldm.data.caption_length import by_place, check_lengths, prompts_of
from ldm.data.concepts import ConceptConfig
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.errors import UserError
from ldm.models.text_encoder import CLIPTextEncoder
from tests.factories import photos

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


def captions_of(folder: Path | str, **params) -> dict[str, str]:
    """The captions of a run on one folder, by where they stand."""
    data = DreamBoothDataModule(subject_root=str(folder), class_word="disc", size=16, num_priors=0, **params)
    found = prompts_of(data)
    del found["subject_prompt"]
    return found


LISTED = """{"file_name": "0.png", "text": "a sks disc"}

{"file_name": "1.jpg", "text": ["sks one", "sks two"]}
{"file_name": "0.png", "text": "sks again"}
{"file_name": "not here.png", "text": "sks elsewhere"}
"""


def test_each_caption_has_a_place_of_its_own(subject_folder: Path, tmp_path: Path):
    assert captions_of(subject_folder, captions=True) == {}
    (subject_folder / "metadata.jsonl").write_text(LISTED)
    (subject_folder / "2.json").write_text('["sks first", "sks second"]')
    (subject_folder / "3.txt").write_text("sks alone")
    listed = subject_folder / "metadata.jsonl"
    assert captions_of(subject_folder, captions=True) == {
        f"{listed}:1, 0.png": "a sks disc",
        f"{listed}:4, 0.png": "sks again",
        f"{listed}:3, 1.jpg": "sks one",
        f"{listed}:3, 1.jpg, caption 2": "sks two",
        str(subject_folder / "2.json"): "sks first",
        f"{subject_folder / '2.json'}, caption 2": "sks second",
        str(subject_folder / "3.txt"): "sks alone",
    }
    lines = tmp_path / "all.txt"
    lines.write_text("# lines\n{identifier} {class_word}\n\n  sks   asleep\n")
    wanted = {f"{lines}:2": "sks disc", f"{lines}:4": "sks asleep"}
    assert captions_of(subject_folder, captions=str(lines)) == wanted
    for path in [path for path in subject_folder.iterdir() if path.suffix not in (".txt", ".json", ".jsonl")]:
        path.rename(path.with_stem(f"sks by {path.stem}"))
    named = captions_of(subject_folder, captions="file_names")
    assert set(named.values()) == {"sks by"} and len(named) == 4
    assert str(subject_folder / "sks by 0.png") in named


@pytest.mark.parametrize("line", [0, 1, 2, 3])
@pytest.mark.parametrize("form", ["metadata.jsonl", "all.txt"])
def test_an_identifier_that_is_cut_off_is_found_in_any_line(
    encoder: CLIPTextEncoder, subject_folder: Path, tmp_path: Path, form: str, line: int
):
    texts = ["a sks disc"] * 4
    texts[line] = f"{LONG} sks"
    names = ["0.png", "1.jpg", "2.png", "3.webp"]
    if form == "all.txt":
        file = tmp_path / form
        file.write_text("\n".join(texts))
        captions, where = str(file), rf"all\.txt:{line + 1}\)"
    else:
        rows = [
            f'{{"file_name": "{name}", "text": "{text}"}}' for name, text in zip(names, texts, strict=True)
        ]
        (subject_folder / form).write_text("\n".join(rows))
        captions, where = True, rf"metadata\.jsonl:{line + 1}, {names[line]}\)"
    with pytest.raises(UserError, match=f"comes after them.*{where}"):
        check_lengths(captions_of(subject_folder, captions=captions), encoder, identifiers=["sks"])


def test_a_caption_that_several_concepts_fill_is_read_for_each(
    encoder: CLIPTextEncoder, subject_folder: Path, tmp_path: Path
):
    rings, lines = photos(tmp_path / "rings"), tmp_path / "all.txt"
    words = [("sks", "disc", subject_folder), ("zwx", "ring", rings), ("a long name", "vase", rings)]
    concepts = [ConceptConfig(root=str(r), identifier=i, class_word=c, name=c) for i, c, r in words]
    lines.write_text("{identifier} {class_word}\na grey red disc on the grass {identifier}\n")
    given = {"concepts": concepts, "size": 16, "num_priors": 0}
    found = prompts_of(DreamBoothDataModule(**given, captions=str(lines)))
    of_lines = {key: text for key, text in found.items() if "all.txt" in key}
    assert of_lines == {
        f"{lines}:{line}, for {name}": text.format(identifier=identifier, class_word=name)
        for identifier, name, _ in words
        for line, text in ((1, "{identifier} {class_word}"), (2, "a grey red disc on the grass {identifier}"))
    }
    with pytest.raises(UserError, match=r"a long name.*all\.txt:2, for vase\)"):
        check_lengths(found, encoder, identifiers=[identifier for identifier, _, _ in words])
    (rings / "1.txt").write_text("{identifier} in a photo of two concepts")
    shared = prompts_of(DreamBoothDataModule(**given, captions=True))
    assert {key: text for key, text in shared.items() if "1.txt" in key} == {
        f"{rings / '1.txt'}, for ring": "zwx in a photo of two concepts",
        f"{rings / '1.txt'}, for vase": "a long name in a photo of two concepts",
    }


def test_prompts_that_are_the_same_for_all_have_one_place():
    found = [("a", "x", "one"), ("b", "x", "one"), ("a", "y", "one"), ("b", "y", "two"), ("b", "z", "two")]
    assert by_place(found) == {"a": "one", "b, for x": "one", "b, for y": "two", "b, for z": "two"}
    assert by_place([]) == {}
