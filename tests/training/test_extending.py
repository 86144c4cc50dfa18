"""docs/extending.md, as it is written: its code trains, let in by --allow alone."""

import re
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm import targets
from ldm.config import instantiate
from ldm.errors import UserError
from ldm.evaluation.protocol import CLASS_SAMPLINGS
from ldm.evaluation.storybook import ClassImages, Measurement, Subject
from ldm.reports.run_page import cards
from ldm.runs.options import parse
from tests.factories import build_module

ROOT = Path(__file__).resolve().parents[2]
WEIGHTING = "model.params.objective.weighting"
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
MODULES = ("mine", "mine_metric", "mine_regularizer")
ALLOW_ALL = [word for module in MODULES for word in ("--allow", module)]


@pytest.fixture
def mine(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files in a folder outside the package, which is on the path as the page has it."""
    for name, text in re.findall(r"`(mine\w*\.\w+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL):
        (workdir / name).write_text(text)
    (workdir / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.setattr(targets, "ALLOWED", list(targets.ALLOWED))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
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
    batch = plain.on_before_batch_transfer(batch_of(2), 0)
    timesteps = batch["randomness"][:16].view(torch.int64)
    alpha = plain.process.alphas_cumprod[timesteps]
    with torch.no_grad():
        losses = [network.eval().loss_per_item(batch) for network in (module, plain)]
    torch.testing.assert_close(losses[0], losses[1] * (1 - alpha) ** 0.5)  # 1 / (1 + SNR) = 1 - alpha
    assert not torch.allclose(losses[0], losses[1])


def test_each_example_has_its_files(mine: Path):
    assert {path.name for path in mine.glob("mine*")} == {f"{m}.{s}" for m in MODULES for s in ("py", "yaml")}


def test_the_metric_of_the_page_is_measured_and_shown(mine: Path):
    config = parse(["--base", "configs/dreambooth.yaml", "mine_metric.yaml", "--allow", "mine_metric"])
    assert config.evaluation["params"]["class_samples"] == 64  # what the run's own says stays
    evaluation = instantiate(config.evaluation)

    def measurement(fidelity: list[list[float]]) -> Measurement:
        reading = {"context": torch.tensor([0, 1]), "class": torch.tensor([0, 1])}
        of_class = {name: ClassImages(reading, torch.eye(2)) for name in CLASS_SAMPLINGS}
        shares = torch.tensor(fidelity)
        return Measurement(shares, torch.ones_like(shares), torch.zeros(2), of_class, of_class)

    after, base = measurement([[1.0, 0.5], [1.0, 1.0]]), measurement([[0.0, 0.5], [0.5, 1.0]])
    metrics = evaluation.summary(after, base, Subject({}, ceiling=1.0))
    assert (metrics["exact"], metrics["base"]["exact"], metrics["subject_fidelity"]) == (0.75, 0.25, 0.875)
    (shown,) = [card for card in cards(metrics) if card["note"].name == "Exact"]
    assert shown["value"] == "0.75" and shown["beside"] == ["base 0.25"]


def test_the_regularizer_of_the_page_pulls_to_the_base(mine: Path, tiny_config: dict):
    words = ["--base", "configs/dreambooth.yaml", "mine_regularizer.yaml", "--allow", "mine_regularizer"]
    assert parse(words).model["params"]["l1_sp_weight"] == 1e-5
    params = tiny_config | {"l1_sp_weight": 0.5}
    module = instantiate({"target": "mine_regularizer.L1SP", "params": params})
    module.setup("fit")
    plain = build_module(tiny_config)
    weights = list(module.networks["text_encoder"].parameters())
    with torch.no_grad():
        weights[0][0, 0] += 3.0
    plain.load_state_dict(module.state_dict())
    batch = plain.on_before_batch_transfer(batch_of(2), 0)
    losses = [network.training_step(batch, 0) for network in (module, plain)]
    torch.testing.assert_close(losses[0], losses[1] + 0.5 * 3.0)
    gradients = [
        torch.autograd.grad(loss, network)[0][0, 0]
        for loss, network in zip(
            losses, (weights[0], next(plain.networks["text_encoder"].parameters())), strict=True
        )
    ]
    torch.testing.assert_close(gradients[0], gradients[1] + 0.5)


def batch_of(count: int) -> dict:
    """Items of both streams."""
    return {
        "latent_stats": torch.rand(count, 8, 8, 8, generator=torch.Generator().manual_seed(0)),
        "caption": ["a", "b"] * (count // 2),
        "stream": ["subject", "prior"] * (count // 2),
        "item": torch.arange(count) + 3,
    }


def test_every_config_of_the_page_is_one(mine: Path):
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) > 1
    for block in blocks:
        (mine / "block.yaml").write_text(block)
        config = parse(["--base", "configs/dreambooth.yaml", "block.yaml", *ALLOW_ALL])
        assert OmegaConf.merge(config.container, OmegaConf.create(block)) == config.container
