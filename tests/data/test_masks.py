"""Masks of photos: found by name, cropped, mirrored and averaged exactly as the photo is."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.data.concepts import ConceptConfig
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import formats, list_images
from ldm.data.masks import area_average, find_masks, masks_by_name, masks_of
from ldm.data.photo_check import photo_facts
from ldm.errors import UserError
from tests.data.test_dreambooth import items, noise, ready

SIZE, FACTOR = 8, 2


def grey(path: Path, width: int, height: int, *, seed: int) -> Path:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    levels[0, 0] = 255
    Image.fromarray(levels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos whose shorter side is the training size, so that no pixel is resampled; each its own mask."""
    (tmp_path / "subject").mkdir()
    for k, (width, height) in enumerate([(8, 8), (13, 8), (8, 20), (9, 8)]):
        photo = grey(tmp_path / f"subject/{k}.png", width, height, seed=k)
        photo.with_name(f"{k}.mask.png").write_bytes(photo.read_bytes())
    return tmp_path / "subject"


def data_of(folder: Path, **params: object) -> DreamBoothDataModule:
    own = {"subject_root": str(folder), "class_word": "dog", "size": SIZE, "masks": True, "num_priors": 0}
    data = DreamBoothDataModule(**own | params)
    data.check()
    data.attach(encode=encode, vae_hash="v", latent_factor=FACTOR)
    data.setup()
    return data


def encode(images: Tensor) -> Tensor:
    return torch.cat([images[:, :, ::2, ::2], images[:, :, 1::2, 1::2].abs()], dim=1)


def test_area_means_count_pixels_in_part():
    values = np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    np.testing.assert_allclose(area_average(values, (0, 0, 3, 2), (2, 3)), values)
    np.testing.assert_allclose(area_average(values, (0, 0, 3, 2), (1, 1)), [[2.5]])
    halves = area_average(values, (0, 0, 3, 2), (1, 2))  # of 1.5 columns each
    np.testing.assert_allclose(halves, [[(1.5 * 1 + 2.5 * 0.5) / 1.5, (3.5 * 1 + 2.5 * 0.5) / 1.5]])
    np.testing.assert_allclose(area_average(values, (1, 0.5, 1, 1), (1, 1)), [[(1 + 4) / 2]])
    fine = np.random.default_rng(0).random((37, 53))
    for shape in ((5, 7), (37, 11), (1, 1)):
        assert area_average(fine, (0, 0, 53, 37), shape).mean() == pytest.approx(fine.mean())


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_mask_is_cropped_and_mirrored_with_its_photo(folder: Path, crop: str):
    stream = data_of(folder, crop=crop).dataset.streams["subject"]
    masks = data_of(folder, crop=crop).dataset.masks
    assert set(masks) == set(stream.views()) and {view.flip for view in masks} == {False, True}
    for view, mask in masks.items():
        pixels = (view.render()[:1] + 1) / 2
        torch.testing.assert_close(mask, F.avg_pool2d(pixels, FACTOR), rtol=0, atol=1e-6)


def test_a_mask_is_scaled_with_its_photo(tmp_path: Path):
    """A mask that is half white, at a size that is no multiple of the training size."""
    noise(1, 30, 50).save(tmp_path / "a.jpg")
    mask = np.zeros((30, 50), np.uint8)
    mask[:, :25] = 255
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    for view, found in data_of(tmp_path).dataset.masks.items():
        expected = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 4, 4)
        torch.testing.assert_close(found, expected.flip(2) if view.flip else expected)


def test_batches_carry_masks_cached_or_not(folder: Path, tmp_path: Path):
    (tmp_path / "class").mkdir()
    noise(3, SIZE, SIZE).save(tmp_path / "class/0.png")
    params = {"prior_root": str(tmp_path / "class"), "batch_size": 2, "hold_out": True}
    cached, decoded = data_of(folder, **params), data_of(folder, **params, cache_latents=False, num_workers=1)
    batch = next(iter(cached.loader()))
    assert batch["mask"].shape == (4, 1, SIZE // FACTOR, SIZE // FACTOR)
    assert (batch["mask"][2:] == 1).all() and (batch["mask"][:2] < 1).any()  # prior items are all subject
    for one, other in zip(items(cached, 6), items(decoded, 6), strict=True):
        assert torch.equal(one["mask"], other["mask"])
    (held,) = islice(cached.val_dataloader(), 1)
    assert held["mask"].shape == batch["mask"].shape
    assert "mask" not in next(iter(ready(subject_root=str(folder), num_priors=0).loader()))


def alpha(folder: Path) -> None:
    photo = Image.open(folder / "0.png").convert("RGB")
    photo.putalpha(Image.open(folder / "0.mask.png"))
    photo.save(folder / "0.png")
    (folder / "0.mask.png").unlink()


def aside(folder: Path) -> None:
    (folder.parent / "kohya").mkdir()
    for mask in folder.glob("*.mask.png"):
        mask.rename(folder.parent / "kohya" / mask.name.replace(".mask", ""))


NAMES: dict[str, tuple[Callable[[Path], object], dict]] = {
    "OneTrainer's": (lambda f: (f / "0.mask.png").rename(f / "0-masklabel.png"), {}),
    "with the photo's suffix": (lambda f: (f / "0.mask.png").rename(f / "0.png.mask.png"), {}),
    "the alpha channel": (alpha, {}),
    "kohya's folder": (aside, {"mask_root": "kohya"}),
}


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_found_by_other_tools_names(folder: Path, name: str):
    expected = list(data_of(folder).dataset.masks.values())
    rename, params = NAMES[name]
    rename(folder)
    found = data_of(folder, **{key: str(folder.parent / value) for key, value in params.items()})
    assert len(list_images(folder)) == 4  # masks are no photos
    for one, other in zip(found.dataset.masks.values(), expected, strict=True):
        assert torch.equal(one, other)


def redraw(folder: Path, width: int, height: int, mode: str = "L", color: object = 255) -> None:
    Image.new(mode, (width, height), color).save(folder / "1.mask.png")


def off_centre(folder: Path) -> None:
    mask = np.zeros((20, 8), np.uint8)
    mask[0] = 255
    Image.fromarray(mask).save(folder / "2.mask.png")


def more(folder: Path) -> None:
    Image.new("L", (13, 8), 255).save(folder / "1-masklabel.png")


def test_the_photos_own_folder_as_that_of_the_masks_is_beside_them(folder: Path):
    """There an image is a photo, unless its name says that it is a mask."""
    beside, named = data_of(folder), data_of(folder, mask_root=str(folder))
    assert beside.dataset.masks.keys() == named.dataset.masks.keys()
    for view, mask in beside.dataset.masks.items():
        assert torch.equal(mask, named.dataset.masks[view])
    paths = list_images(folder)
    assert [f.subject for f in photo_facts(paths, mask_root=folder)] == [
        f.subject for f in photo_facts(paths)
    ]
    for mask in folder.glob("*mask*"):
        mask.unlink()
    with pytest.raises(UserError, match="photos have no mask"):
        data_of(folder, mask_root=str(folder))


def test_a_photo_without_a_suffix_has_one_mask(tmp_path: Path):
    """Its stem is its name."""
    mask = tmp_path / "IMG_1.mask.png"
    assert masks_of(tmp_path / "IMG_1", {"IMG_1": [mask]}) == [mask]
    both = {"1": [mask], "1.jpg": [tmp_path / "1.jpg.png"]}
    assert masks_of(tmp_path / "1.jpg", both) == [mask, tmp_path / "1.jpg.png"]


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "another size": (lambda f: redraw(f, 26, 16), r"mask is 26 x 16 pixels, 1\.png 13 x 8.*1\.mask\.png"),
    "a turned mask": (lambda f: redraw(f, 8, 13), r"mask is 8 x 13 pixels, 1\.png 13 x 8"),
    "an empty mask": (lambda f: redraw(f, 13, 8, color=0), r"brightest pixel is 0 of 255.*1\.mask\.png"),
    "labels": (lambda f: redraw(f, 13, 8, color=1), "brightest pixel is 1 of 255.*white"),
    "colours": (lambda f: redraw(f, 13, 8, "RGB", (255, 0, 0)), "The mask has colours"),
    "a cut-out": (lambda f: redraw(f, 13, 8, "RGBA", (255, 255, 255, 0)), "mask is itself transparent"),
    "no image": (lambda f: (f / "1.mask.png").write_bytes(b"P"), r"image cannot be read.*1\.mask\.png"),
    "none for two": (
        lambda f: [(f / f"{k}.mask.png").unlink() for k in (1, 3)],
        r"2 of 4 photos have no mask: 1\.png, 3\.png.*make_masks\.py",
    ),
    "two for one": (more, r"1\.png has 2 masks: 1-masklabel\.png, 1\.mask\.png.*all but one"),
    "one without a photo": (
        lambda f: (f / "3.png").unlink(),
        r"photo of this mask is not there.*3\.mask\.png",
    ),
    "one outside of the crop": (off_centre, r"crop leaves the whole mask out.*2\.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_masks_are_refused_in_one_sentence(folder: Path, case: str):
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises(UserError, match=message):
        data_of(folder)


def test_a_folder_of_masks_is_checked_too(folder: Path):
    with pytest.raises(UserError, match="no such folder of masks.*nowhere"):
        data_of(folder, mask_root=str(folder / "nowhere"))
    aside(folder)
    grey(folder.parent / "kohya/other.png", 8, 8, seed=9)
    with pytest.raises(UserError, match=r"photo of this mask is not there.*other\.png"):
        data_of(folder, mask_root=str(folder.parent / "kohya"))


def several(folder: Path, **params: object) -> DreamBoothDataModule:
    """The subject, and another whose photos and masks have the same names."""
    other = folder.parent / "other"
    if not other.exists():
        other.mkdir()
        for k in range(3):
            grey(other / f"{k}.png", SIZE, SIZE, seed=10 + k)
            grey(other / f"{k}.mask.png", SIZE, SIZE, seed=20 + k)
    concepts = [
        ConceptConfig(root=str(folder), identifier="sks", class_word="dog"),
        ConceptConfig(root=str(other), identifier="zwx", class_word="cat"),
    ]
    return data_of(folder, **dict.fromkeys(("subject_root", "class_word")), concepts=concepts, **params)


def test_each_of_several_subjects_has_its_own_masks(folder: Path):
    """Though their photos have the same names; "No mask" told those of the second before."""
    data = several(folder, flip=False)
    files = data.mask_files
    assert len(files) == 7
    assert all(file == photo.with_name(f"{photo.stem}.mask.png") for photo, file in files.items())
    masks = {view.source.path: mask for view, mask in data.dataset.masks.items()}
    for k in range(3):
        path = folder.parent / f"other/{k}.png"
        levels = np.asarray(Image.open(files[path]), dtype=np.float64) / 255
        expected = area_average(levels, (0, 0, SIZE, SIZE), (SIZE // FACTOR,) * 2)
        np.testing.assert_allclose(masks[path][0], expected, atol=1e-6)


def test_masks_of_several_subjects_are_checked_folder_by_folder(folder: Path):
    several(folder)
    grey(folder.parent / "other/7.mask.png", SIZE, SIZE, seed=7)
    with pytest.raises(UserError, match=r"photo of this mask is not there.*other/7\.mask\.png"):
        several(folder)
    (folder.parent / "other/7.mask.png").rename(folder.parent / "other/2.png.mask.png")
    with pytest.raises(UserError, match=r"2\.png has 2 masks.*other"):
        several(folder)
    for file in folder.parent.glob("other/2*.mask.png"):
        file.unlink()
    with pytest.raises(UserError, match=r"1 of 3 photos have no mask: 2\.png.*other"):
        several(folder)


def test_a_folder_of_masks_serves_several_subjects_whose_photos_have_names_of_their_own(folder: Path):
    several(folder)
    aside(folder)
    root = str(folder.parent / "kohya")
    with pytest.raises(UserError, match=r"subject/0\.png and .*other/0\.png would have the same mask"):
        several(folder, mask_root=root)
    for k in range(3):
        other = folder.parent / "other"
        (other / f"{k}.png").rename(other / f"cat {k}.png")
        (other / f"{k}.mask.png").rename(folder.parent / f"kohya/cat {k}.png")
    files = several(folder, mask_root=root).mask_files
    assert len(files) == 7 and all(file.name == photo.name for photo, file in files.items())


def test_the_mask_of_a_photo_that_is_skipped_is_no_stray(folder: Path):
    (folder / "3.png").write_bytes(b"no image")
    assert len({view.source for view in data_of(folder, skip_unreadable=True).dataset.masks}) == 3


def test_an_opaque_alpha_channel_is_no_mask(folder: Path):
    alpha(folder)
    photo = Image.open(folder / "0.png")
    photo.putalpha(255)
    photo.save(folder / "0.png")
    with pytest.raises(UserError, match=r"1 of 4 photos have no mask: 0\.png"):
        data_of(folder)


def test_a_photo_of_a_phone_has_a_mask_too(folder: Path):
    """HEIC, in which the alpha channel is looked for as in any other format."""
    formats()  # registers its decoder
    (folder / "0.png").unlink()
    Image.effect_noise((16, 16), 50).convert("RGB").save(folder / "0.heic", format="HEIF", quality=-1)
    grey(folder / "0.mask.png", 16, 16, seed=0)
    photos = DreamBoothDataModule(subject_root=str(folder), class_word="dog", size=SIZE).subject_photos
    assert find_masks(photos)[folder / "0.heic"] == folder / "0.mask.png"
    (folder / "0.mask.png").unlink()
    with pytest.raises(UserError, match="1 of 4 photos have no mask: 0.heic"):
        find_masks(photos)


def test_a_name_longer_than_any_file_systems_is_no_folder():
    for read in (list_images, masks_by_name):
        with pytest.raises(UserError, match="There is no such folder"):
            read(Path("9" * 5000))
