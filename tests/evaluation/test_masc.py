"""Masked consistency: means over pairs of what the package says, here of a scripted stand-in for it."""

import importlib.util
import json
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.commands import dreambench
from ldm.data.images import load_image
from ldm.errors import UserError
from ldm.evaluation import masc
from ldm.evaluation.dreambench import METRICS
from ldm.evaluation.masc import CP, MaskedConsistency
from ldm.reports.dreambench_page import dreambench_csv, measured, table_of
from ldm.runs import dreambench_results
from tests.data.test_photo_check import masked, noise
from tests.evaluation.test_dreambench import root  # noqa: F401


class Scripted:
    """Scores a pair by the grey levels in their middles, and keeps what it is given."""

    def __init__(self, *args: Any, **options: Any):
        self.args = args
        self.options = options
        self.given: list[dict[str, Any]] = []

    def score(self, **given: Any) -> SimpleNamespace:
        self.given.append(given)
        greys = [level(given[name]) for name in ("ref_image", "out_image")]
        return SimpleNamespace(cp=greys[0] - greys[1] / 7, pf=float("nan"))


def level(image: Image.Image) -> float:
    return image.convert("L").getpixel((image.width // 2, image.height // 2)) / 255


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos, with a mask beside each."""
    for k, box in enumerate([(30, 20, 60, 44), (10, 5, 50, 60), (0, 0, 20, 20)]):
        noise(k).save(tmp_path / f"{k}.png")
        masked(box).save(tmp_path / f"{k}.mask.png")
    return tmp_path


def test_it_is_the_mean_over_pairs_with_the_photos_masks(folder: Path):
    images = [noise(10, (40, 40)), noise(11, (40, 30))]
    scripted = Scripted()
    found = MaskedConsistency("x", load=lambda *args: scripted)(images, folder)
    photos = [load_image(folder / f"{k}.png") for k in range(3)]
    pairs = [level(photo) - level(image) / 7 for image in images for photo in photos]
    among = [level(photos[i]) - level(photos[j]) / 7 for i in range(3) for j in range(3) if i != j]
    assert found[CP] == pytest.approx(sum(pairs) / 6) and found[f"photos_{CP}"] == pytest.approx(
        sum(among) / 6
    )
    assert len(scripted.given) == 12
    for given, k in zip(scripted.given, [0, 1, 2] * 2, strict=False):
        white = np.asarray(Image.open(folder / f"{k}.mask.png")) / 255
        assert np.array_equal(given["ref_mask"], white) and given["ref_image"].size == (96, 64)
        assert given["out_mask"].shape == (given["out_image"].height, given["out_image"].width)
    (folder / "1.mask.png").unlink()
    with pytest.raises(UserError, match="1 of 3 photos have no mask: 1.png"):
        MaskedConsistency("x", load=lambda *args: scripted)(images, folder)


def test_without_the_package_it_is_refused_in_a_sentence(root, monkeypatch):  # noqa: F811
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = ["--root", str(root), "--pictures", str(root), "--masc"]
    with pytest.raises(UserError, match="needs masc-metric, which is not installed.*--masc.*pip install"):
        dreambench.main(dreambench.parse(words))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, scripted."""
    monkeypatch.setitem(sys.modules, "masc", SimpleNamespace(MaSC=Scripted))
    monkeypatch.setattr(masc, "require_masc", lambda: None)
    monkeypatch.setattr("ldm.runs.dreambench.require_masc", lambda: None)


def test_the_command_has_a_column_for_it(root, package, monkeypatch, capsys):  # noqa: F811
    """Subjects that were measured without it are measured again."""
    measured_once = count()

    def metrics(**names: str):
        return lambda images, photos, identifier: dict.fromkeys(METRICS, 0.5 + next(measured_once))

    monkeypatch.setattr(dreambench_results, "BenchMetrics", metrics)
    for name in ("disc", "dog"):
        (root / "given" / name).mkdir(parents=True)
        noise(1).save(root / "given" / name / "00.png")
    words = ["--root", str(root), "--pictures", str(root / "given"), "--subjects", "disc", "dog"]
    dreambench.main(dreambench.parse(words))
    assert "MaSC-CP" not in capsys.readouterr().out
    with pytest.raises(UserError, match="photos have no mask"):
        dreambench.main(dreambench.parse([*words, "--masc", "network"]))
    for path in [*(root / "disc").glob("*.*"), *(root / "dog").glob("*.*")]:
        with Image.open(path) as photo:
            masked((2, 2, 9, 9), photo.size).save(path.with_name(f"{path.name}.mask.png"))
    dreambench.main(dreambench.parse([*words, "--masc", "network"]))
    said, done = capsys.readouterr().out, Path("logs/dreambench-given")
    assert "MaSC-CP" in said and "subject 2 of 2: dog" in said and next(measured_once) == 4
    assert {CP, f"photos_{CP}"} <= json.loads((done / "results/dog.json").read_text()).keys()
    assert f"dinov2,{CP},photos_dino" in (done / "dreambench.csv").read_text()
    assert "MaSC-CP: how well" in (done / "dreambench.html").read_text()


def test_a_network_that_cannot_be_had_is_said(package, monkeypatch):
    def absent(*args: Any, **options: Any):
        raise OSError("x is not a local folder\nand more")

    monkeypatch.setattr(sys.modules["masc"], "MaSC", absent)
    with pytest.raises(UserError, match="cannot be loaded: x is not a local folder .*hf download google/"):
        MaskedConsistency("x")


def test_a_table_of_some_with_it_has_no_column():
    row = {"variant": "measured", "subject": "a", "seed": 0, "images": 4, **dict.fromkeys(METRICS, 0.5)}
    rows = [row | {CP: 0.25}, row | {"subject": "b"}]
    assert measured(rows) == list(METRICS) and CP not in dreambench_csv(rows)
    both = [one | {CP: 0.25} for one in rows]
    assert dict(table_of(both))["Measured here"][-1] == "0.250" and measured(both)[-1] == CP
    assert dict(table_of(both))["DreamBooth, Stable Diffusion"][-1] == ""
