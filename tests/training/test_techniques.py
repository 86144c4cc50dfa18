"""Techniques that a config can switch on: off they change nothing, on they do what their formula says."""

import copy

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.embedding import read_embedding
from ldm.checkpoints.load import read_checkpoint
from ldm.diffusion.process import ProcessConfig
from ldm.errors import UserError
from ldm.models.conditioning import Conditioning
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.techniques import Reference
from tests.factories import TAUGHT, build_module
from tests.short_runs import state_of


@pytest.fixture
def batch() -> dict:
    latent_stats = torch.cat(
        [torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 4, 8, 8)], 1
    )
    return {
        "latent_stats": latent_stats,
        "caption": ["a photo of sks disc"] * 2 + ["a photo of a disc"] * 2,
        "stream": ["subject", "subject", "prior", "prior"],
        "item": torch.tensor([4, 5, 4, 5]),
    }


def build(tiny_config: dict, tiny_networks: dict, **settings: object) -> LatentDiffusion:
    module = build_module(tiny_config, seed=7, **settings)
    for name, network in module.networks.items():
        network.load_state_dict(tiny_networks[name].state_dict())
    return module


class SeenNoise(LatentDiffusion):
    """Keeps what the loss compared the prediction with: eps is the noise itself."""

    def apply_model(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        a = self.process.alphas_cumprod[t].view(-1, 1, 1, 1)
        self.noise = (x - a.sqrt() * self.x0) / (1 - a).sqrt()
        return super().apply_model(x, t, conditioning)


def noise_of(config: dict, batch: dict, *, offset_noise: float = 0.0) -> Tensor:
    module = SeenNoise(**config | {"process": ProcessConfig(offset_noise=offset_noise)}, seed=7)
    module.x0 = batch["latent_stats"].chunk(2, dim=1)[0]
    with torch.no_grad():
        module.loss_per_item(batch)
    return module.noise


def test_a_loras_teacher_is_the_network_without_its_factors(tiny_config, tiny_networks, batch):
    lora = {"target": "ldm.models.lora.LoRA", "params": {"rank": 2}}
    taught = build(tiny_config, tiny_networks, **TAUGHT, trainable={"lora": lora})
    copied = Reference(taught.networks["unet"], taught.networks["text_encoder"])
    taught.setup("fit")
    for factors in taught.lora.parameters():
        torch.nn.init.normal_(factors, std=0.1, generator=torch.Generator().manual_seed(0))
    x, t, prompts = batch["latent_stats"][:, :4], torch.tensor([5, 300, 600, 900]), batch["caption"]
    prediction, copy_prediction = (
        reference.predict(x, t, reference.condition(prompts)) for reference in (taught._reference, copied)
    )
    assert torch.equal(prediction, copy_prediction)
    with torch.no_grad():
        moved = taught.apply_model(x, t, taught.condition(prompts))
    assert (moved - prediction).abs().max() > 0.01


def test_in_mixed_precision_the_teacher_keeps_what_autocast_makes_of_its_weights(tiny_networks, batch):
    networks = tiny_networks["unet"], tiny_networks["text_encoder"]
    full, half = Reference(*networks), Reference(*networks, precision="bf16-mixed")
    x, t, prompts = batch["latent_stats"][:, :4], torch.tensor([5, 300, 600, 900]), batch["caption"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = [reference.predict(x, t, reference.condition(prompts)) for reference in (full, half)]
    assert torch.equal(*predictions)
    assert half.unet.time_embed[0].weight.dtype == torch.bfloat16
    assert half.unet.out[0].weight.dtype == torch.float32  # autocast computes norms in float32


def test_offset_noise_moves_whole_channels_of_an_item(tiny_config, batch):
    plain, moved = noise_of(tiny_config, batch), noise_of(tiny_config, batch, offset_noise=0.5)
    offset = moved - plain
    flat = offset.flatten(2)
    assert (flat - flat.mean(2, keepdim=True)).abs().max() < 2e-3  # one number per item and channel
    means = flat.mean(2) / 0.5
    assert means.abs().max() < 4 and means.std() > 0.4  # drawn from N(0, 1)
    assert len({round(float(x), 4) for x in means.flatten()}) == means.numel()


def test_the_pull_is_its_formula(tiny_config, tiny_networks, batch):
    plain = build(tiny_config, tiny_networks)
    pulled = build(tiny_config, tiny_networks, objective={"l2_sp_weight": 0.25})
    pulled.setup("fit")
    torch.testing.assert_close(pulled.training_step(batch, 0), plain.training_step(batch, 0), rtol=0, atol=0)
    generator = torch.Generator().manual_seed(1)
    moves = {}
    for name, parameter in pulled.named_parameters():
        if parameter.requires_grad:
            moves[name] = 0.01 * torch.randn(parameter.shape, generator=generator)
            for module in (plain, pulled):
                module.get_parameter(name).data += moves[name]
    expected = 0.25 * sum(float(move.square().sum()) for move in moves.values())
    losses = [module.training_step(batch, 0) for module in (plain, pulled)]
    assert float(losses[1] - losses[0]) == pytest.approx(expected, rel=1e-4)
    for loss in losses:
        loss.backward()
    for name, move in moves.items():
        difference = pulled.get_parameter(name).grad - plain.get_parameter(name).grad
        torch.testing.assert_close(difference, 2 * 0.25 * move, rtol=1e-3, atol=1e-5)


def test_a_teacher_is_the_base_itself(tiny_config, tiny_networks, batch):
    """At the start the base predicts what its teacher does: no prior loss, and the subject's is as ever."""
    plain = build(tiny_config, tiny_networks)
    taught = build(tiny_config, tiny_networks, objective={"prior_target": "teacher"})
    taught.setup("fit")
    batch["caption"][3] = ""  # the empty prompt is held as the class is
    with torch.no_grad():
        losses, expected = taught.loss_per_item(batch), plain.loss_per_item(batch)
        assert torch.equal(losses[:2], expected[:2]) and expected[2:].min() > 0.1
        assert losses[2:].max() < 1e-10
        for parameter in taught.model.parameters():
            parameter += 0.01  # the student moves on, the teacher does not
        assert taught.loss_per_item(batch)[2:].min() > 1e-6
    assert not any("reference" in name for name in taught.state_dict())


def test_text_encoder_learns_for_its_first_steps_alone(job, tmp_path):
    """As long as it learns the run is the one in which it learns on; then it stays, and the UNet does not."""
    key = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    unet = "model.diffusion_model.out.2.weight"
    job(tmp_path / "stops", params={"trainable": {"text_encoder_steps": 2}}, checkpoints_kept=9)
    job(tmp_path / "learns", checkpoints_kept=9)
    stops, learns = (
        [state_of(tmp_path / name, step)["state_dict"] for step in (2, 3, 4)] for name in ("stops", "learns")
    )
    assert torch.equal(stops[0][key], learns[0][key])
    assert torch.equal(stops[2][key], stops[0][key]) and not torch.equal(learns[2][key], learns[0][key])
    assert not torch.equal(stops[2][unet], stops[1][unet])


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with the networks"])
def test_a_new_word_is_learned_and_kept_in_its_own_file(job, tmp_path, alone):
    node = {"word": "<my-disc>", "init": "disc", "learning_rate": 0.1}
    learned_token = {"target": "ldm.training.techniques.LearnedToken", "params": node}
    job.identifier = "<my-disc>"
    networks = {"unet": not alone, "text_encoder": not alone}
    params = {"trainable": {"learned_token": learned_token, **networks}}
    module = job(tmp_path / "run", params=params)
    text_encoder = module.cond_stage_model
    vectors, begun = text_encoder.learned_tokens["<my-disc>"], text_encoder.token_embedding_of("disc")
    assert vectors.shape == (len(text_encoder.tokenizer("disc", add_special_tokens=False).input_ids), 32)
    assert (vectors - begun).abs().max() > 0.05  # four steps of some 0.1
    same = {
        name: torch.equal(value, job.weights[part][name])
        for part, network in (("unet", module.networks["unet"]), ("text_encoder", text_encoder))
        for name, value in network.state_dict().items()
        if name in job.weights[part] and "position_ids" not in name
    }
    assert all(same.values()) if alone else not any(same.values())
    model = module.export(tmp_path / "model.safetensors", dtype=torch.float32, metadata={})
    assert not any("learned_tokens" in name for name in read_checkpoint(model)[0])
    kept = read_embedding(tmp_path / "embeddings" / "my-disc.safetensors")
    torch.testing.assert_close(kept, {"<my-disc>": vectors.data})


def test_a_text_encoder_reads_new_words(tiny_networks):
    """The context of a word whose vector is that of another one is that word's context."""
    text_encoder = copy.deepcopy(tiny_networks["text_encoder"])
    before = text_encoder(text_encoder.tokenize(["a photo of a disc"]))
    disc = text_encoder.token_embedding_of("disc").detach()
    text_encoder.add_token("<copy>", disc)
    text_encoder.add_token("<other>", -disc)
    with torch.no_grad():
        same, other, plain = (
            text_encoder(text_encoder.tokenize([f"a photo of a {word}"]))
            for word in ("<copy>", "<other>", "disc")
        )
    assert torch.equal(plain, before) and torch.equal(same, before) and not torch.equal(other, before)
    with pytest.raises(UserError, match="known already"):
        text_encoder.add_token("<copy>", disc)
    with pytest.raises(UserError, match="takes"):
        text_encoder.add_token("<wide>", torch.zeros(1, 99))


def test_zero_terminal_snr_is_refused_where_it_says_nothing(tiny_config):
    with pytest.raises(UserError, match="needs v-prediction"):
        build_module(tiny_config, process={"zero_terminal_snr": True})
