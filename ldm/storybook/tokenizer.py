"""Training of the storybook's tokenizer, a small byte-level BPE in CLIP's format.

Run by `python -m ldm.storybook.tokenizer FOLDER`. Every word of the captions is one token; a rare word such
as an identifier is spelled letter by letter, so any prompt can be tokenized.
"""

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from ldm.storybook.world import caption, full_caption, sample_scene

WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's pre-tokenization
END = "</w>"


def train_tokenizer(folder: Path, *, captions: int = 20_000) -> int:
    """Writes vocab.json and merges.txt -> number of tokens. Deterministic."""
    scenes = [sample_scene(k) for k in range(captions)]
    texts = [caption(s, seed=s.seed, rare_word_share=0.0) for s in scenes] + [full_caption(s) for s in scenes]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix=END, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + END for letter in alphabet]
    tokens += [first + second for first, second in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(vocabulary)


if __name__ == "__main__":
    print(train_tokenizer(Path(sys.argv[1])), "tokens")
