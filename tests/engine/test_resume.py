"""Exact resume: a run that was stopped anywhere and taken up is the one that never was, bit for bit."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.config import instantiate
from ldm.data.buckets import Buckets
from ldm.data.concepts import ConceptConfig
from ldm.engine import resume
from ldm.errors import UserError
from tests.factories import MIN_SNR, TAUGHT, masks, photos
from tests.short_runs import At, Job, Killed, curves_of, differences, kill, state_of

COSINE = {"target": "ldm.optim.schedules.Cosine", "params": {"warmup_steps": 2}}
EVERYTHING = {"lr_schedule": COSINE}
FROZEN_TEXT = {"trainable": {"text_encoder": False}, "objective": {"weighting": MIN_SNR}}
OFFSET = {"process": {"offset_noise": 0.1}}
PULLED = {"objective": {"l2_sp_weight": 0.1}} | OFFSET
NEW_WORD = {"target": "ldm.training.techniques.LearnedToken", "params": {"word": "sks", "init": "disc"}}
WORD_AND_TEXT = {"trainable": {"learned_token": NEW_WORD, "text_encoder_steps": 2}}
WORD_ALONE = {"trainable": {"learned_token": NEW_WORD, "unet": False, "text_encoder": False}}
HELD = {"prior_caption_dropout": 0.5}
PULLED_AND_TAUGHT = {"objective": {"l2_sp_weight": 0.1, "prior_target": "teacher"}} | OFFSET
MASKED = {"objective": {"masks": {"outside": 0.5, "outside_target": "teacher"}}}
LORA = {"trainable": {"lora": {"target": "ldm.models.lora.LoRA", "params": {"rank": 2}}}}


EVERY_STEP, AVERAGED = {"checkpoint_every": 1}, {"ema_decay": 0.9, "checkpoint_every": 1}
HALF = AVERAGED | {"trainer": {"precision": "bf16-true"}}
DECODED = {"cache_latents": False, "num_workers": 2, "crop": "random"}  # by processes, at every step
BUCKETS = {"buckets": Buckets(unit=4), "crop": "random"}
CASES = {  # what is trained and how, and the micro-batches in which it is killed
    "all-learn-with-averages": (EVERYTHING, AVERAGED, {}, range(8)),
    "frozen-text-encoder": (FROZEN_TEXT, {"checkpoint_every": 2}, {}, [2, 5, 7]),
    "pulled-to-the-base": (PULLED, EVERY_STEP, {}, [3, 6]),
    "a-lora-and-its-teacher": (TAUGHT | LORA, EVERY_STEP, HELD, [3, 6]),
    "a-new-word-and-text-for-two-steps": (WORD_AND_TEXT, AVERAGED, {}, [3, 5]),
    "masks-and-the-teacher-outside": (MASKED, EVERY_STEP, {"masks": True}, [3, 6]),
    "masked-photos-in-buckets": (MASKED, EVERY_STEP, {"masks": True, **BUCKETS}, [3]),
    "bfloat16-weights-pulled-and-taught": (EVERYTHING | PULLED_AND_TAUGHT, HALF, HELD, [3]),
    "a-new-word-alone-of-photos-decoded-by-processes": (WORD_ALONE, EVERY_STEP, DECODED, [4]),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_in_any_micro_batch_it_is_the_run_that_never_stopped(job: Job, tmp_path: Path, case: str):
    params, options, data, kills = CASES[case]
    masks(job.subject)
    job = replace(job, accumulate=2, data=data)
    whole = job(tmp_path / "whole", params=params, **options)
    for micro_batch in kills:
        with pytest.raises(Killed):
            job(tmp_path / "again", callbacks=[At(micro_batch, kill)], params=params, **options)
    again = job(tmp_path / "again", params=params, **options)
    assert differences(state_of(tmp_path / "whole", 4), state_of(tmp_path / "again", 4)) == []
    assert differences(whole.state_dict(), again.state_dict()) == []
    curves = curves_of(tmp_path / "whole")
    assert len(curves["train/loss"]) == 4 and len(curves["val/loss"]) == 2
    assert curves_of(tmp_path / "again") == curves


@pytest.mark.parametrize("own", [{}, {"diff_output_preservation": True}], ids=["", "own captions"])
@pytest.mark.parametrize("several", [False, True])
def test_a_held_empty_prompt_resumes_and_accumulates_as_ever(
    job: Job, tmp_path: Path, several: bool, own: dict
):
    """Photos under the empty caption and their class's, the teacher's prediction as target.

    Of one subject, or of two and, where there are no own captions, a style.
    """
    held = replace(job, data={"prior_caption_dropout": 0.5, **own})
    if several:
        ring, style = (str(photos(tmp_path / name)) for name in ("rings", "style"))
        held.data["concepts"] = [
            ConceptConfig(root=str(job.subject), identifier="sks", class_word="disc"),
            ConceptConfig(root=ring, identifier="zwx", class_word="ring", weight=2),
        ]
        if not own:
            held.data["concepts"].append(ConceptConfig(root=style, identifier="qpv", class_word=None))
    params = {"objective": {"prior_target": "teacher"}}
    whole = held(tmp_path / "whole", params=params)
    for micro_batch in (1, 2):
        with pytest.raises(Killed):
            held(tmp_path / "again", callbacks=[At(micro_batch, kill)], params=params)
    again = held(tmp_path / "again", params=params)
    assert differences(whole.state_dict(), again.state_dict()) == []
    curves = curves_of(tmp_path / "whole")
    assert curves_of(tmp_path / "again") == curves
    assert all(loss > 0 for _, loss in curves["train/prior_loss"][1:])
    split = replace(held, batch_size=1, accumulate=2)(tmp_path / "split", params=params)
    base = {f"model.diffusion_model.{name}": value for name, value in job.weights["unet"].items()}
    ends = {name: value for name, value in whole.state_dict().items() if name in base}
    learned = torch.cat([(ends[name] - base[name]).flatten() for name in ends]).norm()
    apart = torch.cat([(ends[name] - split.state_dict()[name]).flatten() for name in ends]).norm()
    assert apart < 0.01 * learned  # one item a micro-batch: AdamW makes steps of the sums' rounding


def test_the_comparison_can_fail(job: Job, tmp_path: Path):
    job(tmp_path / "one", checkpoint_every=4)
    job(tmp_path / "other", checkpoint_every=4, params={"seed": 8})
    found = differences(state_of(tmp_path / "one", 4), state_of(tmp_path / "other", 4))
    assert any("state_dict/model.diffusion_model" in key for key in found)
    assert any("optimizer_states" in key for key in found)


def test_more_steps_go_on_and_fewer_are_refused(job: Job, tmp_path: Path):
    whole = job(tmp_path / "whole")
    replace(job, steps=2)(tmp_path / "again")
    ended = replace(job, steps=2)(tmp_path / "again")  # nothing is left to do: the weights it ended in
    assert differences(ended.state_dict(), state_of(tmp_path / "again", 2)["state_dict"]) == []
    again = job(tmp_path / "again")
    assert differences(whole.state_dict(), again.state_dict()) == []
    assert curves_of(tmp_path / "again") == curves_of(tmp_path / "whole")
    with pytest.raises(UserError, match="The run has done 4 steps already.*4 or more"):
        replace(job, steps=3)(tmp_path / "again")


def test_a_broken_newest_checkpoint_is_skipped_with_a_word(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole = job(tmp_path / "whole")
    replace(job, steps=3)(tmp_path / "again")
    newest = tmp_path / "again" / "checkpoints" / "step-00000003.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with caplog.at_level(logging.INFO):
        again = job(tmp_path / "again")
    assert "step-00000003.ckpt is skipped: its SHA-256 is not the one in" in caplog.text
    assert "Resumed at step 2" in caplog.text
    assert newest.with_name(f"{newest.name}.broken").exists()
    assert differences(whole.state_dict(), again.state_dict()) == []


def write(path: Path, **content: object) -> Path:
    progress = {name: {"total": {}, "current": {}} for name in resume.PROGRESS}
    whole = {key: kind() for key, kind in resume.STATE.items()}
    whole |= {"loops": {"fit_loop": progress | {"state_dict": {}}}, "global_step": 1}
    torch.save(whole | content, path)
    return path


def test_the_newest_is_the_one_of_most_steps_whatever_its_name(tmp_path: Path):
    assert resume.latest_valid_checkpoint(tmp_path) is None
    for step in (3, 20, 100):
        write(tmp_path / f"step-{step:08d}.ckpt", global_step=step)
    last = write(tmp_path / "last.ckpt", global_step=50)  # as Lightning names one
    (tmp_path / "unreadable.ckpt").write_bytes(b"PK")
    assert resume.latest_valid_checkpoint(tmp_path).name == "step-00000100.ckpt"
    assert [path.name for path in resume.by_step(tmp_path)][1] == last.name
    assert (tmp_path / "unreadable.ckpt.broken").exists()


def test_without_a_whole_checkpoint_nothing_is_begun_anew(tmp_path: Path):
    for step in (1, 2):
        (tmp_path / f"step-{step}.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="None of the checkpoints is valid.*Remove the folder"):
        resume.latest_valid_checkpoint(tmp_path)


def test_what_lacks_a_part_is_not_whole(tmp_path: Path):
    path = write(tmp_path / "step-1.ckpt")
    assert resume.validate_checkpoint(path) is None
    for part, wrong in [("state_dict", [1]), ("optimizer_states", None), ("loops", 3), ("global_step", "1")]:
        write(path, **{part: wrong})
        assert part in resume.validate_checkpoint(path)


def test_weights_of_other_networks_are_refused_by_name_and_shape(job: Job, tmp_path: Path):
    replace(job, steps=1)(tmp_path)
    job.config["unet"]["params"]["model_channels"] = 64
    job.weights["unet"] = instantiate(job.config["unet"]).state_dict()
    with pytest.raises(UserError, match=r"weights differ; `model.diffusion_model\S+` is \(.*\) in .* and \("):
        job(tmp_path)


def test_other_learning_parts_are_refused(job: Job, tmp_path: Path):
    replace(job, steps=1)(tmp_path)
    with pytest.raises(UserError, match=r"The checkpoint has \d+ trainable weights, the module \d+"):
        job(tmp_path, params={"trainable": {"text_encoder": False}})


def test_changes_are_named_key_by_key(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    before = {"seed": 1, "model": {"params": {"lr": 0.1}}, "trainer": {"max_steps": 5}, "samples": {}}
    after = {"seed": 1, "model": {"params": {"lr": 0.2}}, "trainer": {"max_steps": 5, "devices": 2}}
    assert resume.config_changes(before, before) == []
    changes = ["model.params.lr: 0.1 -> 0.2", "samples: {} -> not set", "trainer.devices: not set -> 2"]
    assert resume.config_changes(before, after) == changes
    with pytest.raises(UserError, match="model.params.lr: 0.1 -> 0.2; .*--allow_config_change"):
        resume.check_changes(before, after, allowed=False, run=tmp_path)
    resume.check_changes(before, after, allowed=True, run=tmp_path)
    assert "continues with a changed config: model.params.lr: 0.1 -> 0.2" in caplog.text
