"""The disk space of a run's checkpoints."""

from pathlib import Path

from torch import nn

from ldm.engine.resume import by_step, step_of
from ldm.files import require_space
from ldm.optim.sizes import checkpoint_bytes
from ldm.schema import FitConfig


def checkpoints_to_come(config: FitConfig, *, evaluate_every: int, step: int = 0, there: int = 0) -> int:
    """How many more checkpoints than are `there` a run may have on disk at once, from a step on.

    At most those that are kept, the best one and one that is being written, and no more than it writes: every
    `checkpoint_every` steps, at an evaluation that is the best (`evaluate_every`; 0: none), at the end.
    """
    end, every = config.trainer.max_steps, config.checkpoint_every
    written = end // every - step // every + (end > step and end % every > 0)
    if evaluate_every:
        written += end // evaluate_every - step // evaluate_every
    return min(max(1, config.checkpoints_kept + 2 - there), written)


def require_checkpoint_space(
    config: FitConfig, module: nn.Module, *, run: Path, evaluate_every: int, is_new: bool = False
) -> None:
    """Raises UserError where a run's disk has no room for the checkpoints that are still to come.

    is_new: what lies in the folder `run` is of an earlier run of this name.
    """
    found = [] if is_new else by_step(run / "checkpoints")
    step = min(step_of(found[0]), config.trainer.max_steps) if found else 0
    count = checkpoints_to_come(config, evaluate_every=evaluate_every, step=step, there=len(found))
    needed = count * checkpoint_bytes(module, averaged=config.ema_decay is not None)
    require_space(run, needed, what="a run's checkpoints")
