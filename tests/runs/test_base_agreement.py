"""What a base says of itself is what a run trains on: its schedule and its networks, before any work."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ldm.checkpoints.known import flat
from ldm.checkpoints.save import save_model
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.runs.validate import validate
from ldm.schema import RunConfig
from tests.factories import SCHEDULE, run_config

V = {"parameterization": "v"}
ZERO = V | {"zero_terminal_snr": True}
PROCESS, PARAMS = "model.params.process.", "model.params.{}.params."


@pytest.fixture
def base(tmp_path: Path, tiny_config: dict, tiny_networks: dict[str, nn.Module]) -> Callable[..., Path]:
    """Writes the tiny networks with what the file says of them; None says nothing of a network's params."""

    def write(process: dict | None = None, **params: dict | None) -> Path:
        known = flat(copy.deepcopy(tiny_config)) | (process or {})
        for name, own in params.items():
            known[name]["params"] = None if own is None else known[name]["params"] | own
        return save_model(
            tmp_path / "base.safetensors",
            {name: network.state_dict() for name, network in tiny_networks.items()},
            alphas_cumprod=make_alphas_cumprod(**SCHEDULE),
            metadata={"ldm.config": json.dumps(known)},
        )

    return write


@pytest.fixture
def check(workdir: Path, tiny_config: dict, subject_folder: Path) -> Callable[..., None]:
    """Validates a run on a base; `process` and params of networks are the config's own."""

    def run(path: Path, process: dict | None = None, *, parts: dict | None = None, **params: dict) -> None:
        model: dict[str, Any] = copy.deepcopy(tiny_config)
        model["process"] |= process or {}
        for name, own in params.items():
            model[name]["params"] |= own
        config = run_config(
            model, base=path, subject=subject_folder, name="x", base_parts=parts, trainer={"max_steps": 1}
        )
        validate(RunConfig.parse(config))
        assert not Path("logs").exists()

    return run


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"process": V}, {PROCESS + "parameterization": "v"}),
        ({"process": ZERO}, {PROCESS + "parameterization": "v", PROCESS + "zero_terminal_snr": "true"}),
        ({"process": {"linear_end": 0.02}}, {PROCESS + "linear_end": "0.02"}),
        ({"process": {"beta_schedule": "linear"}}, {PROCESS + "beta_schedule": "linear"}),
        ({"unet": {"num_heads": 8}}, {PARAMS.format("unet") + "num_heads": "8"}),
        ({"unet": {"num_head_channels": 16}}, {PARAMS.format("unet") + "num_head_channels": "16"}),
        ({"unet": {"num_groups": 16}}, {PARAMS.format("unet") + "num_groups": "16"}),
        ({"vae": {"scale_factor": 0.5}}, {PARAMS.format("vae") + "scale_factor": "0.5"}),
        ({"text_encoder": {"hidden_act": "gelu"}}, {PARAMS.format("text_encoder") + "hidden_act": "gelu"}),
    ],
)
def test_a_base_of_other_making_is_refused_with_all_keys_to_set(base, check, said, named):
    path = base(**said)
    with pytest.raises(UserError) as error:
        check(path)
    assert str(path) in str(error.value)
    assert error.value.remedy == f"Set {', '.join(f'{key}={value}' for key, value in named.items())}."
    check(path, **said)  # as the remedy says, it is a run


def test_every_key_of_every_network_is_named_at_once(base, check):
    path = base(ZERO | {"timesteps": 500}, vae={"scale_factor": 0.5}, unet={"num_heads": 2, "num_groups": 8})
    with pytest.raises(UserError) as error:
        check(path)
    named = ("parameterization=v", "zero_terminal_snr=true", "timesteps=500", "num_heads=2")
    assert all(f"{key}" in error.value.remedy for key in (*named, "num_groups=8", "scale_factor=0.5"))


def test_each_network_is_compared_with_its_own_base(base, check, tiny_model_file, tmp_path):
    """The schedule with the UNet's alone; a VAE's scale is refused for another cause."""
    path = base(ZERO, unet={"num_heads": 2}, vae={"num_groups": 16}, text_encoder={"hidden_act": "gelu"})
    for part, key in (("unet", "num_heads=2"), ("vae", "num_groups=16"), ("text_encoder", "hidden_act=gelu")):
        with pytest.raises(UserError) as error:
            check(tiny_model_file, parts={part: str(path)})
        assert key in error.value.remedy
        assert ("zero_terminal_snr" in error.value.remedy) == (part == "unet")
        assert error.value.remedy.count("params.") == (4 if part == "unet" else 2)
    with pytest.raises(UserError, match="scales its latents by 0.5"):
        check(tiny_model_file, parts={"vae": str(base(vae={"scale_factor": 0.5}))})


def test_equal_heads_may_be_said_otherwise(base, check):
    check(base(unet={"num_heads": 8, "num_head_channels": 16}), unet={"num_head_channels": 16})


def test_what_is_not_stated_is_not_compared(base, check, caplog):
    path = base(unet=None, vae=None, text_encoder=None, process=dict.fromkeys(()))
    check(path, {"offset_noise": 0.1}, unet={"num_heads": 2, "num_groups": 16}, vae={"scale_factor": 0.5})
    assert "config" not in caplog.text


@pytest.mark.parametrize(("theirs", "ours"), [(2, 1), (1, 2)])
def test_another_clip_skip_is_a_choice_and_said(base, check, caplog, theirs, ours):
    check(base(text_encoder={"clip_skip": theirs}), text_encoder={"clip_skip": ours})
    said = [record.getMessage() for record in caplog.records if "clip_skip" in record.getMessage()]
    assert len(said) == 1 and f"clip_skip is {theirs}, not {ours}" in said[0]


def test_a_rescaled_schedule_is_a_choice_and_said(base, check, caplog):
    """Lin et al. 2024 train it on a model of another."""
    check(base(V | {"zero_terminal_snr": False}), ZERO)
    assert "zero_terminal_snr is false, not true" in caplog.text
