"""Photos as people take them: the subjects of Ruiz et al. 2023 (github.com/google/dreambooth)."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import fit_image, list_images, load_image, to_tensor
from ldm.models.autoencoder import AutoencoderKL

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = Path(os.environ.get("DREAMBOOTH_DATA") or REPOSITORY.parent / "shared" / "data" / "dreambooth")
SUBJECTS = sorted(path for path in ROOT.glob("*") if path.is_dir())

pytestmark = pytest.mark.skipif(
    not SUBJECTS, reason=f"no photos under {ROOT}: set DREAMBOOTH_DATA to google/dreambooth's dataset folder"
)


@pytest.mark.parametrize("folder", SUBJECTS, ids=lambda folder: folder.name)
def test_every_photo_is_read(folder):
    paths = list_images(folder)
    assert len(paths) == len([p for p in folder.iterdir() if p.suffix == ".jpg"])
    assert all(load_image(path).mode == "RGB" for path in paths)


def test_a_subject_trains_at_512_pixels():
    folder = SUBJECTS[0]
    data = DreamBoothDataModule(
        subject_root=str(folder), class_word=folder.name, size=512, num_priors=0, cache_latents=False
    )
    data.check(size_multiple=8)
    data.setup()
    image = next(iter(data.loader()))["image"]
    assert image.shape == (1, 3, 512, 512)
    assert image.std() > 0.1 and image.abs().max() <= 1
    assert not torch.equal(image, data.dataset["subject", 1]["image"][None])


@pytest.mark.slow
@torch.no_grad()
def test_photos_become_latents_of_the_true_size(tmp_path):
    """EXIF, crop, 512 pixels, the autoencoder of Stable Diffusion with the weights it begins with."""
    photo = load_image(next((ROOT / "dog").glob("*.jpg")))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    photo.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    vae, seen = AutoencoderKL().eval(), []
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return vae.encode(images).latent_stats

    options = {"class_word": "dog", "size": 512, "num_priors": 0, "flip": False}
    data = DreamBoothDataModule(subject_root=str(tmp_path), **options)
    data.attach(encode=encode)
    data.setup()
    latent_stats = next(iter(data.loader()))["latent_stats"]
    assert (
        latent_stats.shape == (1, 8, 64, 64)
        and latent_stats.isfinite().all()
        and (latent_stats[:, 4:] > 0).all()
    )
    assert torch.equal(torch.cat(seen), to_tensor(fit_image(photo, 512)).unsqueeze(0))
