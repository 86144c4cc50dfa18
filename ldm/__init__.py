"""DreamBooth on Stable Diffusion.

    from ldm import Text2Image, load_config, train

    run = train(load_config("configs/dreambooth.yaml", overrides={"name": "rex"}))
    Text2Image.from_file(run.folder)("a photo of sks dog on the moon")[0].image

One alphabet of shapes for the whole repository, used in docstrings and einops patterns:

    B  items of a batch          H, W  pixels (height, width)
    C  channels                  h, w  latent cells (H = f * h)
    M  tokens of a prompt (77)   D     width of the text context
    T  diffusion timesteps (1000)

Pixels are RGB in [-1, 1]; latents are already multiplied by the autoencoder's `scale_factor`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
PUBLIC = {
    "Run": "ldm.runs.python",
    "Text2Image": "ldm.pipeline",
    "UserError": "ldm.errors",
    "load_config": "ldm.runs.python",
    "train": "ldm.runs.python",
}
__all__ = ["Run", "Text2Image", "UserError", "load_config", "train"]


def __getattr__(name: str) -> Any:
    """A name of the public interface, whose module is imported at the first use: `import ldm` is quick."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
