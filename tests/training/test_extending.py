"""docs/extending.md, as it is written: its code trains, let in by --allow alone."""

import re
import sys
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from ldm import targets
from ldm.config import instantiate
from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.evaluation.protocol import CLASS_SAMPLINGS
from ldm.evaluation.storybook import ClassImages, Measurement, Subject
from ldm.pipeline import Text2Image
from ldm.reports.curves import read_curves
from ldm.reports.run_page import cards
from ldm.runs import run
from ldm.runs.options import parse
from ldm.runs.sampling import generate_samples
from ldm.runs.validate import validate
from ldm.sampler_nodes import build_sampler, sampling_levels
from ldm.schema import FitConfig, RunConfig, SamplesConfig, TrainerOptions
from tests.factories import build_module, photos, run_config

ROOT = Path(__file__).resolve().parents[2]
WEIGHTING = "model.params.objective.weighting"
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
MODULES = ("mine", "mine_metric", "mine_regularizer", "mine_sampler", "mine_stream")
ALLOW_ALL = [word for module in MODULES for word in ("--allow", module)]


@pytest.fixture
def mine(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files in a folder outside the package, which is on the path as the page has it."""
    for name, text in re.findall(r"`(mine\w*\.\w+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL):
        (workdir / name).write_text(text)
    (workdir / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(str(workdir))
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
        return Measurement(reading, shares, torch.ones_like(shares), torch.zeros(2), of_class, of_class)

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


def test_the_sampler_of_the_page_draws(mine: Path, tiny_networks: dict[str, nn.Module]):
    """By hand: two steps towards Gaussian data; and in a picture, where beta 1 is Euler's method."""
    words = ["--base", "configs/dreambooth.yaml", "mine_sampler.yaml", "--allow", "mine_sampler"]
    node = parse(words).samples.sampler
    assert node == {"target": "mine_sampler.heavy_ball", "params": {"beta": 0.5}}
    process = DiscreteDiffusion(make_alphas_cumprod())
    levels, x = sampling_levels(process, node, steps=2, spacing=None), 0.7
    assert [level.t for level in levels] == [999, 499, 0] and levels[-1].s == 0
    velocity = None
    for level, end in pairwise(levels):  # data N(0, 0.25): x0 is linear in x
        x0 = level.a * 0.25 / (level.a**2 * 0.25 + level.s**2) * x
        eps = (x - level.a * x0) / level.s
        velocity = eps if velocity is None else 0.5 * velocity + 0.5 * eps
        x = end.a / level.a * (x - level.s * velocity) + end.s * velocity
    start = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    drawn = build_sampler(node)(
        lambda x, level: level.a * 0.25 / (level.a**2 * 0.25 + level.s**2) * x, start, levels
    )
    assert drawn.item() == pytest.approx(x, rel=1e-9)
    pipeline = Text2Image(**tiny_networks, process=process, default_size=16)

    def latents(sampler: Any, **how: Any) -> torch.Tensor:
        return pipeline(["a dog"], seeds=[3], sampler=sampler, steps=3, **how)[0].latents

    as_euler = {**node, "params": {"beta": 1.0}}
    torch.testing.assert_close(latents(as_euler), latents("euler"), rtol=1e-4, atol=1e-4)
    assert (latents(node) - latents("euler")).abs().max() > 1e-3
    samples = SamplesConfig(sampler=node, n=1, steps=3, guidance_scale=7.5, seed=3)
    (_, (image,)), *_ = generate_samples(pipeline, samples, ["a dog"])
    assert image.tobytes() == pipeline(["a dog"], seeds=[3], sampler=node, steps=3)[0].image.tobytes()
    with pytest.raises(UserError, match="heavy_ball sampler has no eta"):
        latents(node, eta=0.5)


PLACES = ("samples.sampler", "priors.sampler", "evaluation.params.sampler")


@pytest.mark.parametrize("key", PLACES)
def test_a_sampler_of_ones_own_is_let_in_by_allow_alone(mine: Path, key: str):
    word = f"{key}={{target: mine_sampler.heavy_ball, params: {{beta: 0.5}}}}"
    base = ["--base", "configs/dreambooth.yaml", word]
    with pytest.raises(UserError, match=r"`mine_sampler\.heavy_ball` is not an allowed target"):
        parse(base)
    allowed = [*base, "--allow", "mine_sampler"]
    assert OmegaConf.select(parse(allowed).source, key).params.beta == 0.5


def test_the_arguments_of_a_sampler_are_checked_as_a_class_s_are(mine: Path):
    key = "samples.sampler"
    node = f"{key}={{target: mine_sampler.heavy_ball, params: {{beta: 0.5}}}}"
    words = ["--base", "configs/dreambooth.yaml", node, "--allow", "mine_sampler"]
    for wrong, message in [
        ("beta=2", f"at most 1.*{key}.params.beta"),
        ("bets=1", f"bets.*{key}.params.*Did you mean `beta`"),
        ("noise=1", f"`noise` is not a parameter of heavy_ball.*{key}.params.noise"),
    ]:
        with pytest.raises(UserError, match=message):
            parse([*words, f"{key}.params.{wrong}"])


@pytest.mark.parametrize(
    "signature, refused",
    [
        ("denoise, x, levels", "is called with"),
        ("denoise, x, *, noise, callback", "is called with"),
        ("denoise, x, levels, *, noise, callback, strength", "needs `strength`"),
        ("denoise, x, levels, *, noise, callback, **more", None),
        ("f, x, levels, noise=None, callback=None, *, more=1", None),
    ],
)
def test_a_function_that_is_no_sampler_is_refused_before_any_work(mine: Path, signature: str, refused: str):
    (mine / "mine_other.py").write_text(f"def sample({signature}): ...\n")
    sys.modules.pop("mine_other", None)
    words = ["--base", "configs/dreambooth.yaml", "samples.sampler={target: mine_other.sample}"]
    if refused is None:
        assert parse([*words, "--allow", "mine_other"]).samples.sampler["target"] == "mine_other.sample"
        return
    with pytest.raises(UserError, match=f"{refused}.*samples.sampler"):
        parse([*words, "--allow", "mine_other"])


def test_where_a_class_is_built_no_function_stands(mine: Path):
    words = ["--base", "configs/dreambooth.yaml", "--allow", "mine_sampler"]
    for key in ("model.params.optimizer", "evaluation", "model"):
        with pytest.raises(UserError, match="is not a class of mine_sampler"):
            parse([*words, f"{key}.target=mine_sampler.heavy_ball"])


def test_every_place_of_a_sampling_has_its_spacing_checked(
    workdir: Path, tiny_config: dict, tiny_model_file: Path, subject_folder: Path
):
    """With zero-terminal SNR a sampling that does not begin in noise alone is refused where it is asked."""
    tiny_config = tiny_config | {"process": {"parameterization": "v", "zero_terminal_snr": True}}
    base = workdir / "base.safetensors"
    save_file(load_file(tiny_model_file), base)  # without what it says of itself
    config = run_config(tiny_config, base=base, subject=subject_folder, name="one", trainer={"max_steps": 1})
    config["evaluation"] = {"target": "ldm.evaluation.storybook.StorybookEvaluation", "params": {}}
    validate(RunConfig.parse(config))
    for key in ("samples", "priors", "evaluation.params"):
        wrong = OmegaConf.create(config)
        OmegaConf.update(wrong, f"{key}.spacing", "leading", force_add=True)
        with pytest.raises(UserError, match=rf"must begin at the last timestep.*{key}\.spacing"):
            validate(RunConfig.parse(wrong))


def test_the_stream_of_the_page_trains(mine: Path, tiny_config: dict, subject_folder: Path):
    """Its items are in each batch, its mean is in the loss by its weight, and it has a curve."""
    words = ["--base", "configs/dreambooth.yaml", "mine_stream.yaml", "--allow", "mine_stream"]
    parsed = parse(words)
    assert (parsed.model["params"]["scene_loss_weight"], parsed.data["params"]["scene_batch_size"]) == (
        0.5,
        2,
    )
    photos(mine / "scenes")
    rates = {"trainable": {"learning_rate": 1e-3}, "objective": {"prior_loss_weight": 3.0}}
    params = tiny_config | rates | {"scene_loss_weight": 0.5, "seed": 7}
    module = instantiate({"target": "mine_stream.LearnsScenes", "params": params})
    own = {"scene_root": "scenes", "scene_caption": "a place", "scene_batch_size": 2}
    own |= {"subject_root": str(subject_folder), "prior_root": str(subject_folder), "class_word": "disc"}
    own |= {"size": 16, "batch_size": 1, "seed": 7, "validation_batches": 1}
    data = instantiate({"target": "mine_stream.WithScenes", "params": own})
    data.attach(encode=module.encode_images, vae_hash="tiny")
    data.setup()
    first, second = islice(iter(data.loader()), 2)
    assert first["stream"] == ["subject", "prior", "scene", "scene"]
    assert first["caption"][2:] == ["a place"] * 2 and second["item"].tolist() == [1, 1, 2, 3]
    batch = module.on_before_batch_transfer(first, 0)
    with torch.no_grad():
        losses = module.eval().loss_per_item(batch)
        total = module.objective.combine(losses, batch["stream_masks"]).total
    torch.testing.assert_close(total, losses[0] + 3.0 * losses[1] + 0.5 * losses[2:].mean())
    (mine / "run").mkdir()
    trainer = TrainerOptions(max_steps=2, accelerator="cpu", log_every_n_steps=1, enable_progress_bar=False)
    run.fit(module, data, FitConfig(trainer=trainer), folder=mine / "run", callbacks=[])
    assert len(read_curves(mine / "run" / "tensorboard")["train/scene_loss"]) == 2


def test_a_function_weighs_as_a_class_does(mine: Path, tiny_config: dict):
    (mine / "mine_function.py").write_text(
        "def p2(process, t, *, gamma: float = 1.0):\n    return (1.0 + process.snr(t)) ** -gamma\n"
    )
    targets.allow("mine_function")
    node = {"target": "mine_function.p2", "params": {"gamma": 0.5}}
    module = build_module(tiny_config, objective={"weighting": node})
    t = torch.tensor([3, 700])
    weights = module.objective.weighting(module.process, t)
    torch.testing.assert_close(weights, (1 - module.process.alphas_cumprod[t]) ** 0.5)


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
