"""Masked consistency with photos: concept preservation of MaSC (Bartkowiak et al.), by their package."""

import importlib.util
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ldm.data.captions import Captions
from ldm.data.images import ImageFiles, list_images, load_image
from ldm.data.items import SourceImage
from ldm.data.masks import find_masks, read_mask
from ldm.errors import UserError
from ldm.files import file_sha256

SIGLIP2 = "google/siglip2-so400m-patch16-naflex"  # the network of the metric's authors
CP = "masc_cp"  # the metric in tables


class Scorer(Protocol):
    """The package's `MaSC`, of which `.score(...).cp` is taken."""

    def score(self, **given: Any) -> Any: ...


def require_masc() -> None:
    """Raises UserError where the package masc-metric is not installed."""
    if importlib.util.find_spec("masc") is None:
        remedy = 'Install it with `pip install -c constraints.txt -e ".[masc]"`, or take --masc off.'
        raise UserError("MaSC-CP needs masc-metric, which is not installed", where="--masc", remedy=remedy)


def load_scorer(model: str, device: str) -> Scorer:
    """The package's metric on a SigLIP2, a folder in transformers' format or a name on the hub.

    Raises UserError where the package or the network cannot be had.
    """
    require_masc()
    import masc

    try:
        return masc.MaSC(model, device=device)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        remedy = f"Download it with `hf download {SIGLIP2}`, or give its folder."
        raise UserError(f"The network cannot be loaded: {reason}", where=model, remedy=remedy) from error


class MaskedConsistency:
    """How well the masked subject of photos is found again in images: 1 is the same in every patch.

    Of each of a photo's patches inside its mask the largest cosine with any patch of the image, and their
    mean; then the mean over pairs of an image and a photo. What is around the subject in photos does not
    count, as it does for DINO. The package's other score, of prompts, needs masks of the images too, which
    nobody has drawn; it is not computed.
    """

    def __init__(self, model: str = SIGLIP2, *, device: str = "cpu", load: Callable = load_scorer):
        self.scorer: Scorer = load(model, device)

    def __call__(self, images: Sequence[Image.Image], photos: Path) -> dict[str, float]:
        """images; the folder of photos and their masks -> "masc_cp", and of two photos or more
        "photos_masc_cp", theirs with one another."""
        masks = masks_of_photos(photos)
        files = ImageFiles(masks)
        seen = [(load_image(path), mask) for path, mask in masks.items()]
        found = {CP: fmean(self._score(*photo, image) for image in images for photo in seen)}
        if len(seen) > 1:
            pairs = permutations(range(len(seen)), 2)
            found[f"photos_{CP}"] = fmean(self._score(*seen[i], files[j]) for i, j in pairs)
        return found

    def _score(self, photo: Image.Image, mask: np.ndarray, image: Image.Image) -> float:
        nowhere = np.zeros((image.height, image.width), np.uint8)
        given = {"ref_image": photo, "ref_mask": mask, "out_image": image, "out_mask": nowhere}
        return float(self.scorer.score(**given, prompt="").cp)


def masks_of_photos(folder: Path) -> dict[Path, np.ndarray]:
    """Photo -> its mask [H, W] in [0, 1]. Raises UserError for photos without masks, and for bad masks."""
    photos = [SourceImage(path, file_sha256(path), Captions(())) for path in list_images(folder)]
    return {photo: read_mask(file, photo) for photo, file in find_masks(photos).items()}
