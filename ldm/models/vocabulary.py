"""CLIP's tokenizer, from a folder of its vocabulary or from the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import CLIPTokenizer

from ldm.errors import UserError
from ldm.shipped import find_file

VOCABULARY = ("vocab.json", "merges.txt")


def load_tokenizer(name: str) -> CLIPTokenizer:
    """CLIP's tokenizer, from a folder (in the current one, or one that ships) or from the hub."""
    given = find_file(name)
    folder = given if given.is_dir() else _download(name)
    whole = (folder / "tokenizer.json").is_file()  # alone, as transformers 5 saves it
    if not whole and not all((folder / file).is_file() for file in VOCABULARY):
        raise UserError("The tokenizer folder lacks vocab.json or merges.txt", where=folder)
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds, by the tokenizers library
        raise UserError(f"The tokenizer cannot be read: {str(error)[:200]}", where=folder) from error


def _download(name: str) -> Path:
    """Folder of the vocabulary files in the Hugging Face cache; they are downloaded if they are not there."""
    try:
        try:
            paths = [hf_hub_download(name, file, local_files_only=True) for file in VOCABULARY]
        except LocalEntryNotFoundError:
            paths = [hf_hub_download(name, file) for file in VOCABULARY]
    except (OSError, ValueError) as error:
        raise UserError(
            "The tokenizer is neither a folder nor available from the Hugging Face hub",
            where=name,
            remedy="Where there is a network, run `hf download openai/clip-vit-large-patch14 "
            f"{' '.join(VOCABULARY)} --local-dir tokenizer`; then give that folder as `tokenizer`.",
        ) from error
    return Path(paths[0]).parent
