"""Exact resume of SDXL's trainings: what was killed and taken up is the run that never was, bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.factories import TAUGHT
from tests.short_runs import At, Job, Killed, curves_of, differences, kill, state_of

NEW_WORD = {"target": "ldm.training.techniques.LearnedToken", "params": {"word": "sks", "init": "disc"}}
LORA = {"target": "ldm.models.lora.LoRA", "params": {"rank": 2}}
RATES = {"text_encoder_learning_rate": {"clip_l": 5e-4, "clip_g": 1e-3}}
HELD = {"prior_caption_dropout": 0.5}
AVERAGED = {"ema_decay": 0.9}
CASES = {  # params, options and data of the training, and the micro-batches in which it is killed
    "all-learn-at-rates-of-their-own": ({"trainable": RATES}, AVERAGED, {}, [3]),
    "a-lora-and-its-teacher": (TAUGHT | {"trainable": {"lora": LORA}}, AVERAGED, HELD, [3]),
    "a-new-word-in-both-encoders": (
        {"trainable": {"learned_token": NEW_WORD, "unet": False, "text_encoder": False}},
        AVERAGED,
        {"cache_latents": False},
        [1],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_in_any_micro_batch_it_is_the_run_that_never_stopped(xl_job: Job, tmp_path: Path, case: str):
    params, options, data, kills = CASES[case]
    job = replace(xl_job, accumulate=2, data=xl_job.data | data)
    whole = job(tmp_path / "whole", params=params, **options)
    for micro_batch in kills:
        with pytest.raises(Killed):
            job(tmp_path / "again", callbacks=[At(micro_batch, kill)], params=params, **options)
    again = job(tmp_path / "again", params=params, **options)
    assert differences(state_of(tmp_path / "whole", 4), state_of(tmp_path / "again", 4)) == []
    assert differences(whole.state_dict(), again.state_dict()) == []
    assert curves_of(tmp_path / "again") == curves_of(tmp_path / "whole")
