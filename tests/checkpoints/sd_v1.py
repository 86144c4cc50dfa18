"""Names of all 1,143 tensors in a released Stable Diffusion v1 file, written down by structure.

Apart from the library on purpose: it is what the networks and `ldm.checkpoints.layout` are compared with.
Counts: model.diffusion_model 686, first_stage_model 248, text_model 196 and its position ids, schedule 12.
"""

from collections.abc import Iterator

LINEAR = ("weight", "bias")


def names() -> set[str]:
    return {
        *(f"model.diffusion_model.{name}" for name in unet()),
        *(f"first_stage_model.{name}" for name in autoencoder()),
        *(f"cond_stage_model.transformer.text_model.{name}" for name in text_encoder()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        *SCHEDULE,
    }


SCHEDULE = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
    posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2""".split()


def _layers(prefix: str, *layers: str) -> Iterator[str]:
    return (f"{prefix}.{layer}.{kind}" for layer in layers for kind in LINEAR)


def unet() -> Iterator[str]:
    yield from _layers("time_embed", "0", "2")
    yield from _layers("out", "0", "2")
    yield from _layers("input_blocks.0", "0")
    for level in range(4):
        for block in (1, 2):
            where = f"input_blocks.{3 * level + block}"
            yield from _res_block(f"{where}.0", skip=block == 1 and level in (1, 2))
            yield from _transformer(f"{where}.1") if level < 3 else ()
        if level < 3:
            yield from _layers(f"input_blocks.{3 * level + 3}.0", "op")
    yield from _res_block("middle_block.0", skip=False)
    yield from _transformer("middle_block.1")
    yield from _res_block("middle_block.2", skip=False)
    for block in range(12):  # every one takes a skip connection, so its channels change
        yield from _res_block(f"output_blocks.{block}.0", skip=True)
        yield from _transformer(f"output_blocks.{block}.1") if block > 2 else ()
        if block in (2, 5, 8):
            yield from _layers(f"output_blocks.{block}.{1 if block == 2 else 2}", "conv")


def _res_block(where: str, *, skip: bool) -> Iterator[str]:
    yield from _layers(where, "in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    yield from _layers(where, "skip_connection") if skip else ()


def _transformer(where: str) -> Iterator[str]:
    yield from _layers(where, "norm", "proj_in", "proj_out")
    block = f"{where}.transformer_blocks.0"
    yield from _layers(block, "norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")
    for attention in ("attn1", "attn2"):
        yield from (f"{block}.{attention}.to_{kind}.weight" for kind in "qkv")
        yield from _layers(f"{block}.{attention}", "to_out.0")


def autoencoder() -> Iterator[str]:
    for name in ("quant_conv", "post_quant_conv"):
        yield from (f"{name}.{kind}" for kind in LINEAR)
    for half in ("encoder", "decoder"):
        yield from _layers(half, "conv_in", "norm_out", "conv_out")
        yield from _vae_block(f"{half}.mid.block_1", skip=False)
        yield from _vae_block(f"{half}.mid.block_2", skip=False)
        yield from _layers(f"{half}.mid.attn_1", "norm", "q", "k", "v", "proj_out")
    for level in range(4):  # channels 128, 256, 512, 512
        for block in range(2):
            yield from _vae_block(f"encoder.down.{level}.block.{block}", skip=block == 0 and level in (1, 2))
        for block in range(3):
            yield from _vae_block(f"decoder.up.{level}.block.{block}", skip=block == 0 and level in (0, 1))
        if level < 3:
            yield from _layers(f"encoder.down.{level}.downsample", "conv")
        if level > 0:
            yield from _layers(f"decoder.up.{level}.upsample", "conv")


def _vae_block(where: str, *, skip: bool) -> Iterator[str]:
    yield from _layers(where, "norm1", "conv1", "norm2", "conv2")
    yield from _layers(where, "nin_shortcut") if skip else ()


def text_encoder() -> Iterator[str]:
    yield from ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
    yield from (f"final_layer_norm.{kind}" for kind in LINEAR)
    for layer in range(12):
        where = f"encoder.layers.{layer}"
        yield from _layers(where, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
        yield from _layers(where, *(f"self_attn.{kind}_proj" for kind in ("q", "k", "v", "out")))
