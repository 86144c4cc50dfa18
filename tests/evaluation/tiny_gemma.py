"""A Gemma 3 of random weights, built from its config, with a tokenizer of bytes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

SPECIAL = ("<pad>", "<bos>", "<eos>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<unk>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}model: {% endif %}"
)
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def save_tiny_gemma(folder: Path) -> Path:
    """Four tokens an image of 28 pixels; 263 tokens of text."""
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_of_text = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], unk_token="<unk>")
    )
    bytes_of_text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of_text.decoder = decoders.ByteLevel()
    names = {"boi_token": SPECIAL[3], "eoi_token": SPECIAL[4], "image_token": SPECIAL[5]}
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_of_text, extra_special_tokens=names, **special)
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    text = Gemma3TextConfig(
        **SIZE, vocab_size=len(vocabulary), num_hidden_layers=2, num_key_value_heads=1, head_dim=16,
        sliding_window=64, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = SiglipVisionConfig(**SIZE, num_hidden_layers=1, image_size=28, patch_size=7)
    config = Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4,
        boi_token_index=3, eoi_token_index=4, image_token_index=5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Gemma3ForConditionalGeneration(config)
        torch.nn.init.normal_(network.model.multi_modal_projector.mm_input_projection_weight)  # begins at 0
    network.save_pretrained(folder)
    Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=4).save_pretrained(folder)
    return folder
