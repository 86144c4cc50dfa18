"""What a finished run leaves, and whether it is what another left: for the soak."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from ldm.data.images import load_image
from ldm.engine.resume import by_step, validate_checkpoint
from ldm.reports.curves import read_curves


def folders(name: str) -> dict[str, str]:
    """The folders that a run shares with others."""
    return {"priors": f"priors-{name}", "latents": f"latents-{name}"}


def left_by(name: str) -> dict[str, object]:
    """All that a finished run leaves and that no clock decides, by what it is."""
    (model,) = Path("logs").glob(f"{name}*/model.safetensors")
    folder = model.parent
    last = torch.load(by_step(folder / "checkpoints")[0], weights_only=True)
    state = {k: last[k] for k in ("state_dict", "current_model_state", "optimizer_states", "global_step")}
    clocks = ("train/images_per_second", "train/peak_memory_mib")
    curves = {k: v for k, v in read_curves(folder / "tensorboard").items() if k not in clocks}
    pictures = sorted([*folder.glob("samples/*.png"), *folder.glob("samples/before/*.png")])
    shared = {what: Path(path) for what, path in folders(name).items()}
    priors = [path for path in sorted(shared["priors"].glob("*/*")) if not path.name.startswith(".")]
    kept = {
        p.name: load_file(p) for p in [*priors, *shared["latents"].glob("*")] if p.suffix == ".safetensors"
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    return {
        "model": load_file(model),
        "checkpoint": state,
        "curves": curves,
        "pictures": {str(p.relative_to(folder)): load_image(p).tobytes() for p in pictures},
        "priors": {p.name: p.read_bytes() for p in priors if p.name not in kept},
        "latents": kept,
        "report": [page.endswith("</html>\n"), *re.findall(r'src="data:image/[^"]*"', page)],
        "files": sorted(p.name for p in folder.iterdir()),
    }


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def torn(name: str) -> list[Path]:
    """Checkpoints that are not whole, and unfinished files, in the folders of a run."""
    found = [p for p in Path("logs").glob(f"{name}*/checkpoints/*.ckpt") if validate_checkpoint(p)]
    return found + list(Path("logs").glob(f"{name}*/**/*.broken"))
