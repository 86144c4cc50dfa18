"""Names and shapes of the 294 text tensors in a released Stable Diffusion 2.x file, by structure.

Apart from the library on purpose. UNet and autoencoder have the names of SD v1 (`sd_v1`), 686 and 248.
"""

PREFIX = "cond_stage_model.model."


def text_encoder(*, width: int = 1024, layers: int = 24) -> dict[str, tuple[int, ...]]:
    """OpenCLIP's ViT-H-14 without its image tower."""
    shapes = {
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "logit_scale": (),
        "token_embedding.weight": (49408, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        shapes |= {
            f"{block}.ln_1.weight": (width,),
            f"{block}.ln_1.bias": (width,),
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            f"{block}.ln_2.weight": (width,),
            f"{block}.ln_2.bias": (width,),
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_fc.bias": (4 * width,),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
            f"{block}.mlp.c_proj.bias": (width,),
        }
    return {PREFIX + name: shape for name, shape in shapes.items()}
