"""docs/extending.md, as it is written: its code trains, let in by --allow alone."""

import re
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm import targets
from ldm.errors import UserError
from ldm.training.options import parse
from tests.factories import build_module

ROOT = Path(__file__).resolve().parents[2]
WEIGHTING = "model.params.objective.weighting"
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


@pytest.fixture
def mine(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files in a folder outside the package, which is on the path as the page has it."""
    for name, text in re.findall(r"`(mine\.\w+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL):
        (workdir / name).write_text(text)
    (workdir / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.setattr(targets, "ALLOWED", list(targets.ALLOWED))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return workdir


WORDS = ("--base", "configs/dreambooth.yaml", "mine.yaml")


def test_a_config_alone_lets_nothing_in(mine: Path):
    refused = rf"`mine\.P2` is not an allowed target \({re.escape(WEIGHTING)}\.target.*--allow"
    with pytest.raises(UserError, match=refused):
        parse(WORDS)
    assert "mine" not in sys.modules


@pytest.mark.parametrize("package", ["absent", "mine.absent", "../mine", "", "mine.", "os;"])
def test_a_package_that_is_not_there(mine: Path, package: str):
    with pytest.raises(UserError, match="There is no package .*--allow.*PYTHONPATH"):
        parse([*WORDS, "--allow", package])


def test_only_the_package_itself_is_let_in(mine: Path):
    (mine / "mine2.py").write_text("class P2: ...")
    with pytest.raises(UserError, match=r"`mine2\.P2` is not an allowed target"):
        parse([*WORDS, "--allow", "mine", f"{WEIGHTING}.target=mine2.P2"])


def test_its_parameters_are_checked_as_ours(mine: Path):
    refused = rf"should be .*at least 0.*{re.escape(WEIGHTING)}\.params\.gamma"
    with pytest.raises(UserError, match=refused):
        parse([*WORDS, "--allow", "mine", f"{WEIGHTING}.params.gamma=-1"])


def test_the_weighting_of_the_page_weighs(
    mine: Path, tiny_config: dict, tiny_networks: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
):
    config = parse([*WORDS, "--allow", "mine"])
    weighting = config.model["params"]["objective"]["weighting"]
    assert weighting == OmegaConf.load("mine.yaml").model.params.objective.weighting
    module = build_module(tiny_config, objective={"weighting": weighting})
    plain = build_module(tiny_config)
    plain.load_state_dict(module.state_dict())
    generator = torch.Generator().manual_seed(0)
    batch = {
        "latent_stats": torch.rand(2, 8, 8, 8, generator=generator),
        "caption": ["a", "b"],
        "stream": ["subject", "prior"],
        "item": torch.tensor([3, 4]),
    }
    batch = plain.on_before_batch_transfer(batch, 0)
    timesteps = batch["randomness"][:16].view(torch.int64)
    alpha = plain.process.alphas_cumprod[timesteps]
    with torch.no_grad():
        losses = [network.eval().loss_per_item(batch) for network in (module, plain)]
    torch.testing.assert_close(losses[0], losses[1] * (1 - alpha) ** 0.5)  # 1 / (1 + SNR) = 1 - alpha
    assert not torch.allclose(losses[0], losses[1])


def test_every_config_of_the_page_is_one(mine: Path):
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) > 1
    for block in blocks:
        (mine / "block.yaml").write_text(block)
        config = parse(["--base", "configs/dreambooth.yaml", "block.yaml", "--allow", "mine"])
        params = config.model["params"]
        assert OmegaConf.merge(params, OmegaConf.create(block).model.params) == params
