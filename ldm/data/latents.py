"""Latent cache: the VAE's posterior of every training image, computed once and kept on disk.

The cache holds mean and standard deviation, so a cached item samples its posterior anew at every step, as an
uncached one does.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import UserError
from ldm.files import atomic_write, make_folder

log = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]  # [B, 3, H, W] in [-1, 1] -> latent stats [B, 2z, h, w]


AT_ONCE = 8  # views, and fewer from 192 pixels on:
PIXELS_AT_ONCE = 512**2  # SD's encoder takes 640 MiB for these, beside the networks


def views_at_once(size: int) -> int:
    """How many views of size x size pixels are encoded together."""
    return max(1, min(AT_ONCE, PIXELS_AT_ONCE // size**2))


def point_posterior(latents: Tensor) -> Tensor:
    """Latent stats [2z, h, w] of a posterior with std 0, whose samples are the latents [z, h, w]."""
    return torch.cat([latents, torch.zeros_like(latents)])


def save_latents(path: Path, latents: Tensor, *, metadata: Mapping[str, str]) -> None:
    """Writes latents as float32 safetensors, atomically, with their checksum in the metadata.

    Half precision would change them, and the 64 KiB of an SD latent are little beside its image.
    """
    latents = latents.detach().float().cpu().contiguous()
    with atomic_write(path) as temporary:
        save_file({"latents": latents}, temporary, metadata={**metadata, "sha256": _checksum(latents)})


def load_latents(path: Path) -> tuple[Tensor, dict[str, str]] | None:
    """Latents and metadata of a file that `save_latents` wrote; None if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            latents, metadata = file.get_tensor("latents").clone(), file.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return None
    return (latents, metadata) if metadata.get("sha256") == _checksum(latents) else None


def require_finite(latents: Tensor, *, where: object) -> None:
    """Raises UserError if latents contain NaN or infinity."""
    if not torch.isfinite(latents).all():
        remedy = "Half precision overflows in some autoencoders; use bf16 or float32."
        raise UserError("The latents contain NaN or infinity", where=where, remedy=remedy)


@torch.no_grad()
def cached_latent_stats(
    views: Mapping[str, Callable[[], Tensor]],
    encode: Encode,
    *,
    vae_hash: str,
    folder: Path | None = None,
    batch_size: int = AT_ONCE,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Tensor]:
    """Latent stats [2z, h, w] (float32, CPU) of each view, given as key -> function that renders [3, H, W].

    A key identifies the pixels. With `folder`, latent stats are cached there by key and `vae_hash`, and only
    batches that lack one are encoded: always the same ones, for a result's last bits may depend on its batch.
    `progress(n)` is called for every n more. Raises UserError if any are not finite.
    """
    if folder is not None and not vae_hash:
        raise ValueError("a cache on disk needs the hash of the VAE")
    files = {} if folder is None else _cache_files(views, folder, vae_hash=vae_hash)
    latent_stats = {key: kept[0] for key, file in files.items() if (kept := load_latents(file))}
    if folder is not None:
        log.info("%s: %d of %d views are in the cache", folder, len(latent_stats), len(views))
    if progress:
        progress(len(latent_stats))
    for first in range(0, len(views), batch_size):
        keys = list(views)[first : first + batch_size]
        missing = [key for key in keys if key not in latent_stats]
        if not missing:
            continue
        pixels = torch.stack([views[key]() for key in keys])
        encoded = dict(zip(keys, encode(pixels).float().cpu(), strict=True))
        for key in missing:
            require_finite(encoded[key], where=key)
            latent_stats[key] = encoded[key].clone()
            if folder is not None:
                save_latents(files[key], encoded[key], metadata={"view": key, "vae": vae_hash})
        if progress:
            progress(len(missing))
    return latent_stats


def _cache_files(keys: Iterable[str], folder: Path, *, vae_hash: str) -> dict[str, Path]:
    """Key -> its file in the folder, which is made if it is not there."""
    make_folder(folder)
    names = {key: hashlib.sha256(f"{vae_hash}/{key}".encode()).hexdigest()[:32] for key in keys}
    return {key: folder / f"{name}.safetensors" for key, name in names.items()}


def _checksum(latents: Tensor) -> str:
    return hashlib.sha256(latents.numpy().tobytes()).hexdigest()
