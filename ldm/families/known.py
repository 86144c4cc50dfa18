"""The families that there are, and which of them a model is of."""

from ldm.families.family import Family, StateDicts, Tensors
from ldm.families.sd.family import SD1, SD2
from ldm.families.sdxl.family import SDXL

FAMILIES = (SD1, SD2, SDXL)


def family_of(state_dicts: StateDicts) -> Family:
    """The family by the UNet's structure, whatever its size.

    Only SDXL's has a vector beside the timestep; transformers of SD 2.x begin with linear layers, those of SD
    1.x with convolutions.
    """
    unet = state_dicts.get("unet", {})
    if "label_emb.0.0.weight" in unet:
        return SDXL
    projection = unet.get("middle_block.1.proj_in.weight")
    return SD2 if projection is not None and projection.ndim == 2 else SD1


def released_family(unet: Tensors) -> Family | None:
    """The family of a UNet with the widths of a released one; None for others."""
    conv_in = unet.get("input_blocks.0.0.weight")
    to_k = unet.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    if conv_in is None or to_k is None or conv_in.ndim != 4 or to_k.ndim != 2:
        return None
    widths = (len(conv_in), to_k.shape[1])
    return next((family for family in FAMILIES if family.released == widths), None)
