"""The networks of a DreamBooth run as its training begins: what it is measured against."""

import torch

from ldm.config import instantiate
from ldm.pipeline import Text2Image
from ldm.runs.run import base_files, load_base
from ldm.runs.sampling import text2image
from ldm.schema import RunConfig
from ldm.training.latent_diffusion import LatentDiffusion


def untrained(config: RunConfig) -> tuple[LatentDiffusion, str]:
    """The module with the weights of its base, or bases (`base_parts`), and their sha256.

    Raises UserError for a base that is missing or does not fit.
    """
    module: LatentDiffusion = instantiate(config.model)
    predicts = module.process.parameterization
    base_hash = load_base(module.networks, base_files(config), parameterization=predicts)
    module.add_learned_token()  # and what an adapter takes from the base's weights
    return module, base_hash


def base_pipeline(config: RunConfig, *, device: str | torch.device, dtype: torch.dtype) -> Text2Image:
    """The sampling pipeline of `untrained` networks, for images of the run's size."""
    module, _ = untrained(config)
    for network in module.networks.values():
        network.to(device=device, dtype=dtype)
    return text2image(module, size=config.data["params"]["size"])
