"""Resuming: the latest valid checkpoint of a run, and the check that its config is unchanged."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.checkpoints.tensors import is_plain, unpickle
from ldm.errors import UserError
from ldm.files import file_sha256
from ldm.optim.optimizer_nodes import FUSED_BACKWARD, SHORT

log = logging.getLogger(__name__)

NOTHING = object()
STATE = {  # key of a checkpoint -> its kind
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "callbacks": dict,
    "loops": dict,
    "global_step": int,
    "epoch": int,
    "pytorch-lightning_version": str,
}
PROGRESS = ("epoch_progress", "epoch_loop.batch_progress")  # of Lightning's loops
SAME_MODEL = "Resume with the model section of the original run."


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """The valid checkpoint in `folder` with the most steps; None if there are no checkpoints.

    Invalid ones are logged and renamed to *.broken. Raises UserError if all are invalid.
    """
    paths = by_step(folder)
    for path in paths:
        wrong = validate_checkpoint(path)
        if wrong is None:
            return path
        log.warning("%s is skipped: %s", path, wrong)
        path.rename(path.with_name(f"{path.name}.broken"))
    if paths:
        remedy = "Remove the folder to train from the start."
        raise UserError("None of the checkpoints is valid", where=folder, remedy=remedy)
    return None


def by_step(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, by number of steps, the largest first."""
    return sorted(folder.glob("*.ckpt"), key=step_of, reverse=True)


def name_of(step: int) -> str:
    """File name of the checkpoint after a step."""
    return f"step-{step:08d}.ckpt"


def step_of(path: Path) -> float:
    """Optimizer steps of a checkpoint, from its name or its content; infinite if it is damaged."""
    named = re.search(r"step[-=](\d+)", path.name)
    try:
        return int(named[1] if named else unpickle(path, mapped=True)["global_step"])
    except (UserError, KeyError, TypeError, ValueError):
        return float("inf")


def validate_checkpoint(path: Path) -> str | None:
    """Why a checkpoint is invalid; None if it is valid."""
    kept = path.with_name(f"{path.name}.sha256")
    if kept.exists():
        words = kept.read_text(encoding="utf-8", errors="replace").split()
        if words[:1] != [file_sha256(path)]:
            return f"its SHA-256 is not the one in {kept.name}"
    try:
        content = unpickle(path, mapped=False)  # reads and checks every tensor
    except UserError as error:
        return error.what
    wrong = [key for key, kind in STATE.items() if not isinstance(content.get(key), kind)]
    if wrong:
        return f"it has no {wrong[0]}"
    foreign = [name for name, value in content["state_dict"].items() if not isinstance(value, Tensor)]
    if foreign:
        return f"its weight {foreign[0]} is no tensor"
    return (
        _wrong_optimizer(content["optimizer_states"])
        or _wrong_loops(content["loops"])
        or _wrong_tensors(content)
    )


def _wrong_optimizer(states: list[Any]) -> str | None:
    """What is wrong with the states of the optimizers; None for such as `Optimizer.state_dict` gives."""
    for state in states:
        if not _has(state, {"state": dict, "param_groups": list}):
            return "a state of its optimizer is none"
        if not all(_has(group, {"params": list}) for group in state["param_groups"]):
            return "a group of its optimizer has no params"
        if not all(isinstance(of_parameter, dict) for of_parameter in state["state"].values()):
            return "the optimizer's state of a parameter is none"
    return None


def _wrong_loops(loops: dict[str, Any]) -> str | None:
    """What Lightning would miss in the progress of its loops."""
    fit_loop = loops.get("fit_loop")
    if not _has(fit_loop, dict.fromkeys(PROGRESS, dict) | {"state_dict": dict}):
        return "it has no progress of the loops"
    counts = [fit_loop[name].get(count) for name in PROGRESS for count in ("total", "current")]
    right = all(isinstance(count, dict) and all(type(n) is int for n in count.values()) for count in counts)
    return None if right else "the progress of its loops is no number"


def _has(node: Any, kinds: Mapping[str, type]) -> bool:
    """Whether a node is a dict with these keys, of these kinds."""
    return isinstance(node, dict) and all(isinstance(node.get(key), kind) for key, kind in kinds.items())


def _wrong_tensors(content: Mapping[str, Any]) -> str | None:
    """Whether tensors of the weights or of the optimizers are sparse, without values or of another kind."""
    kept = dict(content["state_dict"])
    for k, state in enumerate(content["optimizer_states"]):
        for number, values in state["state"].items():
            kept |= {f"optimizer {k}, {number}, {name}": value for name, value in values.items()}
    odd = [name for name, value in kept.items() if isinstance(value, Tensor) and not is_plain(value)]
    return f"its {odd[0]} is no plain tensor" if odd else None


def check_fit(state: Mapping[str, Any], module: nn.Module, *, where: Path) -> None:
    """Raises UserError if a checkpoint has other weights, by name and shape, or other trainable ones."""
    held = {name: tuple(tensor.shape) for name, tensor in state["state_dict"].items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = [name for name in sorted(held.keys() | wanted.keys()) if held.get(name) != wanted.get(name)]
    if wrong:
        name = wrong[0]
        there, here = held.get(name, "absent"), wanted.get(name, "absent")
        what = f"{len(wrong)} weights differ; `{name}` is {there} in the checkpoint and {here} here"
        raise UserError(what, where=where, remedy=SAME_MODEL)
    states = state["optimizer_states"]
    moving = sum(len(group["params"]) for optimizer in states for group in optimizer["param_groups"])
    learning = sum(parameter.requires_grad for parameter in module.parameters())
    if moving != learning:
        what = f"The checkpoint has {moving} trainable weights, the module {learning}"
        raise UserError(what, where=where, remedy=SAME_MODEL)


def config_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Differences between two configs, each as "key: old -> new"."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [
        f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key, NOTHING) != new.get(key, NOTHING)
    ]


def check_changes(before: Mapping[str, Any], after: Mapping[str, Any], *, allowed: bool, run: Path) -> None:
    """Raises UserError if the config has changed since the run began, unless that is `allowed`.

    A change that a checkpoint cannot follow is refused in any case.
    """
    _check_possible(dict(_leaves(before)), dict(_leaves(after)), run=run)
    changes = config_changes(before, after)
    if changes and not allowed:
        what = f"The config has changed since this run began: {'; '.join(changes)}"
        raise UserError(what, where=run, remedy="Restore the old values, or add --allow_config_change.")
    for change in changes:
        log.warning("%s continues with a changed config: %s", run, change)


def _check_possible(old: Mapping[str, Any], new: Mapping[str, Any], *, run: Path) -> None:
    """Refuses what a checkpoint cannot follow, given the leaves of two configs."""

    def refuse(key: str, before: object, after: object, *, why: str) -> None:
        remedy = f"Restore {key}={before}, or begin another run."
        raise UserError(
            f"{key} cannot change in a run ({before} -> {after}): {why}", where=run, remedy=remedy
        )

    optimizers = [_optimizer(leaves) for leaves in (old, new)]
    if optimizers[0] != optimizers[1]:
        refuse("model.params.optimizer", *optimizers, why="its states are those of one optimizer")
    averages = [leaves.get("ema_decay") for leaves in (old, new)]
    if averages[0] is not None and averages[1] is None:
        refuse("ema_decay", *averages, why="the weights in its checkpoints are averages")


def _optimizer(leaves: Mapping[str, Any]) -> str:
    """What steps the weights, in a fused backward pass too: a short name, or else a class."""
    key = "model.params.optimizer"
    while leaves.get(f"{key}.target") == FUSED_BACKWARD:
        key += ".params.optimizer"
    name = leaves.get(f"{key}.target", leaves.get(key, "adamw"))
    return {target: short for short, target in SHORT.items()}.get(name, name)


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a mapping, and of empty mappings."""
    if not isinstance(node, Mapping) or not node:
        yield key, node
        return
    for name, inner in node.items():
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))
