"""The names of EMA weights in Stable Diffusion files: `model_ema.` and the UNet's name without its dots."""

import re

EMA_PREFIX = "model_ema."
NETWORK = "diffusion_model"
BLOCKS = ("input_blocks", "output_blocks")  # two numbers follow: the block, and one digit for its layer
WORDS = (  # of the UNet's names
    *(NETWORK, *BLOCKS, "middle_block", "transformer_blocks", "time_embed"),
    *("in_layers", "emb_layers", "out_layers", "skip_connection", "op", "conv", "out"),
    *("attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out"),
    *("norm", "norm1", "norm2", "norm3", "ff", "net", "proj", "weight", "bias"),
)
WORD = re.compile(f"({'|'.join(sorted(WORDS, key=len, reverse=True))})([0-9]*)")


def dotted(name: str) -> str | None:
    """An EMA weight's name -> that of the raw weight in the file; None for what is no weight of the UNet.

    model_ema.diffusion_modelinput_blocks11in_layers0weight ->
    model.diffusion_model.input_blocks.1.1.in_layers.0.weight
    """
    flat = name.removeprefix(EMA_PREFIX)
    words: list[str] = []
    for word, digits in WORD.findall(flat):
        words.append(word)
        if digits:
            words += [digits[:-1], digits[-1]] if word in BLOCKS else [digits]
    return ".".join(["model", *words]) if "".join(words) == flat and words[:1] == [NETWORK] else None
