"""When a training step logs."""

import pytorch_lightning as pl


def is_logged(module: pl.LightningModule) -> bool:
    """Whether the Trainer writes what this step logs.

    Logging costs host time at every step, and a reduction over processes; Lightning writes every
    `log_every_n_steps`. Without a Trainer there is nothing to spare.
    """
    trainer = module._trainer
    if trainer is None:
        return True
    every = trainer.log_every_n_steps
    return trainer.should_stop or (every > 0 and (trainer.global_step + 1) % every == 0)
