"""Names and shapes of the 2,515 tensors in Stable Diffusion XL's released file, by structure.

Apart from the library on purpose. UNet 1680, autoencoder 248 (`sd_v1` has its names), CLIP-L 197, bigG 390.
"""

from collections.abc import Iterator

from tests.checkpoints import sd_v1

Shapes = Iterator[tuple[str, tuple[int, ...]]]
UNET = "model.diffusion_model."
CLIP_L = "conditioner.embedders.0.transformer.text_model."
CLIP_G = "conditioner.embedders.1.model."


def names() -> set[str]:
    own = {UNET + name for name, _ in unet()} | set(text_encoders())
    return own | {f"first_stage_model.{name}" for name in sd_v1.autoencoder()}


def _affine(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def unet() -> Shapes:
    for name, wide in (("time_embed", 320), ("label_emb.0", 2816)):
        yield from _affine(f"{name}.0", 1280, wide)
        yield from _affine(f"{name}.2", 1280, 1280)
    yield from _affine("input_blocks.0.0", 320, 4, 3, 3)
    for block, before, width, depth in (
        (1, 320, 320, 0),
        (2, 320, 320, 0),
        (4, 320, 640, 2),
        (5, 640, 640, 2),
        (7, 640, 1280, 10),
        (8, 1280, 1280, 10),
    ):
        yield from _res_block(f"input_blocks.{block}.0", before, width)
        yield from _transformer(f"input_blocks.{block}.1", width, depth)
    yield from _affine("input_blocks.3.0.op", 320, 320, 3, 3)
    yield from _affine("input_blocks.6.0.op", 640, 640, 3, 3)
    yield from _res_block("middle_block.0", 1280, 1280)
    yield from _transformer("middle_block.1", 1280, 10)
    yield from _res_block("middle_block.2", 1280, 1280)
    before = 1280
    for block, (skip, width, depth) in enumerate(
        ((1280, 1280, 10), (1280, 1280, 10), (640, 1280, 10))
        + ((640, 640, 2), (640, 640, 2), (320, 640, 2))
        + ((320, 320, 0), (320, 320, 0), (320, 320, 0))
    ):
        yield from _res_block(f"output_blocks.{block}.0", before + skip, width)
        yield from _transformer(f"output_blocks.{block}.1", width, depth)
        before = width
    yield from _affine("output_blocks.2.2.conv", 1280, 1280, 3, 3)
    yield from _affine("output_blocks.5.2.conv", 640, 640, 3, 3)
    yield from _affine("out.0", 320)
    yield from _affine("out.2", 4, 320, 3, 3)


def _res_block(where: str, before: int, width: int) -> Shapes:
    yield from _affine(f"{where}.in_layers.0", before)
    yield from _affine(f"{where}.in_layers.2", width, before, 3, 3)
    yield from _affine(f"{where}.emb_layers.1", width, 1280)
    yield from _affine(f"{where}.out_layers.0", width)
    yield from _affine(f"{where}.out_layers.3", width, width, 3, 3)
    yield from _affine(f"{where}.skip_connection", width, before, 1, 1) if before != width else ()


def _transformer(where: str, width: int, depth: int) -> Shapes:
    if not depth:
        return
    yield from _affine(f"{where}.norm", width)
    yield from _affine(f"{where}.proj_in", width, width)
    yield from _affine(f"{where}.proj_out", width, width)
    for k in range(depth):
        block = f"{where}.transformer_blocks.{k}"
        for norm in ("norm1", "norm2", "norm3"):
            yield from _affine(f"{block}.{norm}", width)
        yield from _affine(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _affine(f"{block}.ff.net.2", width, 4 * width)
        for attention, wide in (("attn1", width), ("attn2", 2048)):
            yield f"{block}.{attention}.to_q.weight", (width, width)
            yield f"{block}.{attention}.to_k.weight", (width, wide)
            yield f"{block}.{attention}.to_v.weight", (width, wide)
            yield from _affine(f"{block}.{attention}.to_out.0", width, width)


def text_encoders() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        CLIP_L + "embeddings.position_ids": (1, 77),
        CLIP_L + "embeddings.token_embedding.weight": (49408, 768),
        CLIP_L + "embeddings.position_embedding.weight": (77, 768),
        CLIP_G + "token_embedding.weight": (49408, 1280),
        CLIP_G + "positional_embedding": (77, 1280),
        CLIP_G + "text_projection": (1280, 1280),
        CLIP_G + "logit_scale": (),
    }
    shapes |= _affine(CLIP_L + "final_layer_norm", 768)
    shapes |= _affine(CLIP_G + "ln_final", 1280)
    for layer in range(12):
        where = f"{CLIP_L}encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= _affine(f"{where}.{norm}", 768)
        for kind in ("q", "k", "v", "out"):
            shapes |= _affine(f"{where}.self_attn.{kind}_proj", 768, 768)
        shapes |= _affine(f"{where}.mlp.fc1", 3072, 768)
        shapes |= _affine(f"{where}.mlp.fc2", 768, 3072)
    for layer in range(32):
        where = f"{CLIP_G}transformer.resblocks.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= _affine(f"{where}.{norm}", 1280)
        shapes[f"{where}.attn.in_proj_weight"] = (3840, 1280)
        shapes[f"{where}.attn.in_proj_bias"] = (3840,)
        shapes |= _affine(f"{where}.attn.out_proj", 1280, 1280)
        shapes |= _affine(f"{where}.mlp.c_fc", 5120, 1280)
        shapes |= _affine(f"{where}.mlp.c_proj", 1280, 5120)
    return shapes
