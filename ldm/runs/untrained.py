"""The networks of a DreamBooth run as its training begins: what it is measured against."""

import torch

from ldm.checkpoints.load import init_on_meta
from ldm.config import instantiate
from ldm.families.sdxl.family import vae_dtype
from ldm.pipeline import Text2Image
from ldm.runs.run import base_files, load_base
from ldm.schema import RunConfig
from ldm.training.latent_diffusion import LatentDiffusion

NO_ADAPTER = {"lora": None, "adapter": None}


def load_untrained(config: RunConfig) -> tuple[LatentDiffusion, str]:
    """The module with the weights of its base, or bases (`base_parts`), and their sha256.

    Raises UserError for a base that is missing or does not fit.
    """
    module: LatentDiffusion = instantiate(config.model)
    return module, _load(module, config)


def _load(module: LatentDiffusion, config: RunConfig) -> str:
    predicts = module.process.parameterization
    base_hash = load_base(module.networks, base_files(config), parameterization=predicts)
    module.add_learned_token()  # and what an adapter takes from the base's weights
    return base_hash


def base_pipeline(config: RunConfig, *, device: str | torch.device, dtype: torch.dtype) -> Text2Image:
    """The sampling pipeline of a run's base alone, without its adapter, for images of the run's size."""
    params = config.model["params"]
    params = params | {"trainable": (params.get("trainable") or {}) | NO_ADAPTER}
    with init_on_meta():  # no random weights before the base's
        module = instantiate(config.model | {"params": params})
    _load(module, config)
    is_sdxl = module.networks["unet"].adm_in_channels is not None
    dtypes = dict.fromkeys(module.networks, dtype) | {"vae": vae_dtype(dtype, is_sdxl=is_sdxl)}
    for name, network in module.networks.items():
        network.eval().requires_grad_(False).to(device=device, dtype=dtypes[name])
    size = config.data["params"]["size"]
    return Text2Image(**module.networks, process=module.process, default_size=size, cuda_graph=True)
