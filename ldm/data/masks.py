"""Masks of photos: where the subject is, from a file beside a photo or from its alpha channel.

White (255) is the subject, black what is around it, grey both in part. `photo.mask.png` and OneTrainer's
`photo-masklabel.png` lie beside the photo, kohya's under the photo's name in a folder of their own (its
`conditioning_data_dir`); the alpha channel is kohya's `alpha_mask`.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data.buckets import Shape
from ldm.data.images import SUFFIXES, alpha_channel, load_image, photo_of_mask, upright_size
from ldm.data.items import SourceImage, TrainingView
from ldm.errors import UserError

LEAST_WHITE = 128  # of 255: a mask without a brighter pixel is empty, or holds labels
MOST_COLOR = 16  # of 255, between the channels of a grey JPEG


def find_masks(photos: Sequence[SourceImage], root: str | Path | None = None) -> dict[Path, Path]:
    """Photo -> the file that holds its mask: one beside it or in the folder `root`, or else the photo.

    photos: of one subject or of several, each in a folder of its own.
    Raises UserError for photos without a mask or with two, for masks in `root` without a photo, and for
    photos of one name that would share a mask there.
    """
    paths = list(dict.fromkeys(photo.path for photo in photos))
    if root is not None:
        _check_names_apart(paths, Path(root))
    folders: dict[Path, set[Path]] = {}  # of masks -> those of the photos that they are for
    for path in paths:
        folders.setdefault(Path(root or path.parent), set()).add(path.parent)
    beside = {path.parent.resolve() for path in paths}  # where images are photos, unless they say otherwise
    named = {
        folder: masks_by_name(folder, of_masks_alone=folder.resolve() not in beside) for folder in folders
    }
    found, missing = {}, {}
    for path in paths:
        files = masks_of(path, named[Path(root or path.parent)])
        if len(files) > 1:
            what = f"{path.name} has {len(files)} masks: {', '.join(file.name for file in files)}"
            raise UserError(what, where=files[0].parent, remedy="Remove all but one.")
        if files or has_alpha(path):
            found[path] = files[0] if files else path
        else:
            missing.setdefault(path.parent, []).append(path.name)
    for folder, names in missing.items():
        count = sum(path.parent == folder for path in paths)
        what = f"{len(names)} of {count} photos have no mask: {', '.join(names)}"
        remedy = "Put NAME.mask.png there, by hand or by scripts/make_masks.py, or take objective.masks off."
        raise UserError(what, where=root or folder, remedy=remedy)
    for folder, of_photos in folders.items():
        _check_no_strays(named[folder], of_photos)
    return found


def _check_names_apart(photos: Sequence[Path], root: Path) -> None:
    by_name: dict[str, Path] = {}
    for photo in photos:
        other = by_name.setdefault(photo.stem, photo)
        if other.parent != photo.parent:
            what = f"{other} and {photo} would have the same mask"
            remedy = "Put each mask beside its photo, or name the photos apart."
            raise UserError(what, where=root, remedy=remedy)


def _check_no_strays(named: Mapping[str, Sequence[Path]], folders: Iterable[Path]) -> None:
    """Raises UserError for a mask of no photo. named: of `masks_by_name`. folders: of the photos."""
    there = (path for folder in folders for path in folder.iterdir())  # those that were skipped too
    names = {name for path in there for name in (path.stem, path.name)}
    for alone in (file for name, files in named.items() if name not in names for file in files):
        remedy = "Name it after its photo, or remove it."
        raise UserError("The photo of this mask is not there", where=alone, remedy=remedy)


def masks_by_name(folder: Path, *, of_masks_alone: bool = False) -> dict[str, list[Path]]:
    """Stem or name of a photo -> its masks in a folder; `of_masks_alone`: where any image is a mask.

    Raises UserError if there is no such folder.
    """
    if not os.path.isdir(folder):  # `Path.is_dir` raises for names that are too long
        raise UserError("There is no such folder of masks", where=folder, remedy="Check the path.")
    named: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        whose = photo_of_mask(file)
        if whose is None and of_masks_alone and file.suffix.lower() in SUFFIXES:
            whose = file.stem
        if whose is not None:
            named.setdefault(whose, []).append(file)
    return named


def masks_of(photo: Path, named: Mapping[str, Sequence[Path]]) -> list[Path]:
    """The masks of a photo, by its stem and by its name. named: of `masks_by_name`."""
    names = dict.fromkeys((photo.stem, photo.name))  # one for a photo without a suffix
    return [file for name in names for file in named.get(name, ())]


def has_alpha(path: Path) -> bool:
    """Whether an image is transparent anywhere."""
    return (alpha := alpha_channel(path)) is not None and alpha.getextrema()[0] < 255


def read_mask(file: Path, photo: Path) -> np.ndarray:
    """The mask of a photo, upright -> [H, W] float64 in [0, 1]; `file` is the photo itself for its alpha.

    Raises UserError for a mask of another size, one that is coloured, transparent, or nowhere white.
    """
    if file == photo:
        mask = alpha_channel(file)
    else:
        image = load_image(file)
        if has_alpha(file):
            remedy = "Save it opaque: the subject white, all else black."
            raise UserError("The mask is itself transparent", where=file, remedy=remedy)
        if np.ptp(np.asarray(image, dtype=np.int16), axis=2).max() > MOST_COLOR:
            remedy = "Draw the subject white, all else black."
            raise UserError("The mask has colours", where=file, remedy=remedy)
        mask = image.convert("L")
    height, width = upright_size(photo)
    if mask.size != (width, height):
        what = f"The mask is {mask.width} x {mask.height} pixels, {photo.name} {width} x {height}"
        raise UserError(what, where=file, remedy="Make the mask of the photo as it is.")
    brightest = mask.getextrema()[1]
    if brightest < LEAST_WHITE:
        what = f"The mask is empty: its brightest pixel is {brightest} of 255"
        raise UserError(what, where=file, remedy="Draw the subject white (255).")
    return np.asarray(mask, dtype=np.float64) / 255


def area_average(
    values: np.ndarray, box: tuple[float, float, float, float], shape: tuple[int, int]
) -> np.ndarray:
    """Means of the cells of a grid: [H, W] -> [h, w], each by the exact area of its pixels, also in part.

    box: (left, top, width, height) of the grid in pixels. shape: (h, w).
    """
    left, top, width, height = box
    rows = _averaging(len(values), top, height, shape[0])
    columns = _averaging(values.shape[1], left, width, shape[1])
    return rows @ values @ columns.T


def _averaging(length: int, first: float, extent: float, cells: int) -> np.ndarray:
    """[cells, length]: which share of a cell each of the pixels is; a row sums to 1."""
    edges = first + extent * np.arange(cells + 1) / cells
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return overlap.clip(min=0) * cells / extent


def latent_masks(
    views: Iterable[TrainingView], files: Mapping[Path, Path], *, factor: int
) -> dict[TrainingView, Tensor]:
    """The masks of views, cropped and mirrored as they are, in latent pixels -> [1, h, w] float32 each.

    files: as of `find_masks`. factor: pixels a side of a latent pixel, whose value is the mean of its area.
    """
    return _averaged(views, files, lambda shape: (shape.height // factor, shape.width // factor))


def _averaged(
    views: Iterable[TrainingView],
    files: Mapping[Path, Path],
    cells: Callable[[Shape], tuple[int, int]],
) -> dict[TrainingView, Tensor]:
    """cells: shape of a view -> rows and columns of its mask, each of which is the mean of its area."""
    found, read = {}, {}
    for view in views:
        path = view.source.path
        if path not in read:
            read = {path: read_mask(files[path], path)}  # one at a time: photos are large
        mask = area_average(read[path], view.crop_box(), cells(view.shape))
        mask = mask[:, ::-1] if view.flip else mask
        found[view] = torch.from_numpy(mask.astype(np.float32)).unsqueeze(0)
    return found


def check_masks(views: Sequence[TrainingView], files: Mapping[Path, Path]) -> None:
    """Raises UserError for masks that cannot be read, and for a photo whose crops all leave its subject out.

    views: of `Stream.views`.
    """
    most: dict[Path, float] = {}
    plain = [view for view in views if not view.flip]
    for view, mask in _averaged(plain, files, lambda shape: (1, 1)).items():
        most[view.source.path] = max(most.get(view.source.path, 0.0), float(mask))
    for path in (path for path, mean in most.items() if mean == 0):
        remedy = "Crop the photo around its subject."
        raise UserError("The training crop leaves the whole mask out", where=path, remedy=remedy)
