"""Latents on disk, and the cache of latent stats."""

import hashlib

import pytest
import torch
from torch import Tensor

from ldm.data.latents import cached_latent_stats, load_latents, save_latents
from ldm.errors import UserError


class Encoder:
    """A VAE's stand-in that counts what it sees: [B, 3, H, W] -> [B, 2, H, W]."""

    def __init__(self):
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return torch.stack([images.mean(1), images[:, 0] + 3], dim=1)


def views(count: int = 5, seed: int = 0) -> dict:
    pixels = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return {f"view {k}": (lambda k=k: pixels[k]) for k in range(count)}


def test_latents_come_back_to_the_bit(tmp_path):
    latents = torch.randn(4, 3, 3)
    save_latents(tmp_path / "a.safetensors", latents, metadata={"seed": "7"})
    again, metadata = load_latents(tmp_path / "a.safetensors")
    assert torch.equal(again, latents) and metadata["seed"] == "7"


def test_absent_torn_and_altered_latents_are_none(tmp_path):
    path = tmp_path / "a.safetensors"
    assert load_latents(path) is None
    save_latents(path, torch.randn(4, 3, 3), metadata={})
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b"x" * 99):
        path.write_bytes(damaged)
        assert load_latents(path) is None
    path.write_bytes(whole)
    assert load_latents(path) is not None


def test_moments_equal_the_encoder_and_are_kept(tmp_path):
    encode, seen = Encoder(), []
    latent_stats = cached_latent_stats(
        views(), encode, vae_hash="v", folder=tmp_path / "cache", batch_size=2, progress=seen.append
    )
    for key, render in views().items():
        assert torch.equal(latent_stats[key], Encoder()(render()[None])[0])
    assert encode.batches == [2, 2, 1] and sum(seen) == 5

    again = cached_latent_stats(
        views(), encode, vae_hash="v", folder=tmp_path / "cache", progress=seen.append
    )
    assert encode.batches == [2, 2, 1] and sum(seen) == 10
    assert all(torch.equal(latent_stats[key], again[key]) for key in latent_stats)


class BatchedEncoder(Encoder):
    """Its last bits depend on how many it sees at once, as those of convolutions do."""

    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images) + len(images) * 2**-20


@pytest.mark.parametrize("left", range(8))
def test_what_is_encoded_after_a_kill_is_what_would_have_been(tmp_path, left):
    whole = cached_latent_stats(views(7), BatchedEncoder(), vae_hash="v", folder=tmp_path, batch_size=3)
    for key in list(views(7))[left:]:  # written in this order
        name = hashlib.sha256(f"v/{key}".encode()).hexdigest()[:32]
        (tmp_path / f"{name}.safetensors").unlink()
    seen = []
    again = cached_latent_stats(
        views(7), BatchedEncoder(), vae_hash="v", folder=tmp_path, batch_size=3, progress=seen.append
    )
    assert all(torch.equal(whole[key], again[key]) for key in whole) and sum(seen) == 7


def test_batches_without_an_absent_or_damaged_view_are_not_encoded(tmp_path):
    cached_latent_stats(views(4), Encoder(), vae_hash="v", folder=tmp_path)
    first, second, *_ = sorted(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:-4])
    second.unlink()
    encode = Encoder()
    latent_stats = cached_latent_stats(views(5), encode, vae_hash="v", folder=tmp_path, batch_size=1)
    assert sum(encode.batches) == 2 + 1  # two of the four, and the fifth view
    fresh = cached_latent_stats(views(5), Encoder(), vae_hash="v")
    assert all(torch.equal(latent_stats[key], fresh[key]) for key in fresh)


def test_another_vae_never_reuses(tmp_path):
    cached_latent_stats(views(), Encoder(), vae_hash="one", folder=tmp_path)
    encode = Encoder()
    cached_latent_stats(views(), encode, vae_hash="two", folder=tmp_path)
    assert sum(encode.batches) == 5
    with pytest.raises(ValueError, match="hash"):
        cached_latent_stats(views(), encode, vae_hash="", folder=tmp_path)


def test_overflow_is_refused_and_not_kept(tmp_path):
    with pytest.raises(UserError, match="NaN"):
        cached_latent_stats(views(), lambda x: x / 0, vae_hash="v", folder=tmp_path)
    assert not list(tmp_path.iterdir())
