"""CLIP's tokenizer, from a folder of its vocabulary or from the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers import CLIPTokenizer

from ldm.errors import UserError
from ldm.models.vocabulary_files import FILES, has_vocabulary
from ldm.shipped import find_file


def load_tokenizer(name: str) -> CLIPTokenizer:
    """CLIP's tokenizer, from a folder (in the current one, or one that ships) or from the hub."""
    folder = local_vocabulary(name) or _download(name)
    if not has_vocabulary(folder):
        raise UserError("The tokenizer folder lacks vocab.json or merges.txt", where=folder)
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds, by the tokenizers library
        raise UserError(f"The tokenizer cannot be read: {str(error)[:200]}", where=folder) from error


def local_vocabulary(name: str) -> Path | None:
    """The folder of a tokenizer on this machine, also of one downloaded before; None if there is none."""
    given = find_file(name)
    if given.is_dir():
        return given
    try:
        return Path([hf_hub_download(name, file, local_files_only=True) for file in FILES][0]).parent
    except (OSError, ValueError):
        return None


def _download(name: str) -> Path:
    """Folder of the vocabulary files in the Hugging Face cache, to which they are downloaded."""
    try:
        return Path([hf_hub_download(name, file) for file in FILES][0]).parent
    except (OSError, ValueError) as error:
        raise UserError(
            "The tokenizer is neither a folder nor available from the Hugging Face hub",
            where=name,
            remedy="Where there is a network, run `hf download openai/clip-vit-large-patch14 "
            f"{' '.join(FILES)} --local-dir tokenizer`; then give that folder as `tokenizer`.",
        ) from error
