"""A run's model to the Hugging Face hub: the card, weights and samples, never photos or checkpoints."""

from argparse import Namespace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from ldm.checkpoints.find_model import find_model
from ldm.checkpoints.hub import SITE
from ldm.errors import UserError
from ldm.runs.model_card import CARD, PICTURES, files_of

MIB = 2**20


def publish(options: Namespace) -> None:
    """Says what would be uploaded, or with `--yes` uploads it in one commit."""
    check_target(options.to)
    folder = find_model(options.run).parent
    files = uploaded(folder, lora_only=options.lora_only)
    private = "public" if options.public else "private"
    print(f"{SITE}/{options.to} ({private}), from {folder}:")
    for name in files:
        print(f"  {name:40} {(folder / name).stat().st_size / MIB:10.1f} MiB")
    if not options.yes:
        print("Nothing was uploaded: read README.md, then add --yes.")
        return
    print(upload(folder, files, options.to, private=not options.public))


def check_target(name: str) -> None:
    """Raises UserError for what is no `user/name` of the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"`{name}` is no name on the hub", where="--to", remedy="Write user/name.") from error
    if name.count("/") != 1:
        raise UserError(f"`{name}` is no name on the hub", where="--to", remedy="Write user/name.")


def uploaded(folder: Path, *, lora_only: bool = False) -> list[str]:
    """The files of a run that are shared, relative to its folder. Raises UserError without a card or LoRA."""
    if not (folder / CARD).is_file():
        remedy = "Write one, README.md, with the licence of the base; a run leaves it with its report."
        raise UserError("There is no model card", where=folder, remedy=remedy)
    weights = list(files_of(folder))
    if lora_only:
        weights = [name for name in weights if name != "model.safetensors"]
        if not weights:
            raise UserError("The run has no LoRA", where=folder, remedy="Take --lora_only off.")
    return [CARD, *weights, *([PICTURES] if (folder / PICTURES).exists() else [])]


def card_of(folder: Path, files: list[str]) -> str:
    """A run's card, of whose weights it names those that are among the files."""
    absent = tuple(f"- `{name}`:" for name in files_of(folder) if name not in files)
    lines = (folder / CARD).read_text(encoding="utf-8").split("\n")
    return "\n".join(line for line in lines if not line.startswith(absent))


def upload(folder: Path, files: list[str], to: str, *, private: bool) -> str:
    """Creates the repository if there is none, and commits the files -> the address of the commit."""
    card = card_of(folder, files).encode()
    operations = [CommitOperationAdd(name, card if name == CARD else folder / name) for name in files]
    try:
        api = HfApi()
        api.create_repo(to, private=private, exist_ok=True)
        if private and not api.repo_info(to).private:  # it was there already
            remedy = "Add --public, or name another repository."
            raise UserError("This repository is public", where=to, remedy=remedy)
        message = f"DreamBooth: {folder.name}"
        return str(api.create_commit(to, operations, commit_message=message).commit_url)
    except LocalTokenNotFoundError as error:
        remedy = "Run `hf auth login` with a token that may write."
        raise UserError("The hub does not know who you are", where=to, remedy=remedy) from error
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "With a network, and rights on it, run the command again."
        raise UserError(f"The hub cannot be written: {reason}", where=to, remedy=remedy) from error
