"""Factors beside frozen layers: nothing at the start, then exactly a change of the weights."""

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoints.lora import merge_lora
from ldm.config import check, instantiate
from ldm.errors import UserError
from ldm.models.lora import LoRA, LoRALayer
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import build_module

NODE = {"target": "ldm.models.lora.LoRA"}
EVERY = {
    "unet": ["attention", "feed_forward", "projections", "convolutions"],
    "text_encoder": ["attention", "feed_forward"],
}


def make(tiny_config: dict, tiny_networks: dict, lora: dict | None, **params) -> LatentDiffusion:
    node = None if lora is None else NODE | {"params": lora}
    module = build_module(tiny_config, seed=7, trainable={"lora": node, **params})
    for name, network in module.networks.items():
        network.load_state_dict(tiny_networks[name].state_dict())
    return module


def randomized(module: LatentDiffusion, std: float = 0.05) -> LatentDiffusion:
    torch.manual_seed(3)
    for parameter in module.lora.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "latent_stats": torch.rand(4, 8, 8, 8, generator=generator),
        "caption": ["a photo of sks disc"] * 2 + ["a photo of a disc"] * 2,
        "stream": ["subject", "subject", "prior", "prior"],
        "item": torch.tensor([4, 5, 4, 5]),
    }


def outputs(module: LatentDiffusion) -> Tensor:
    with torch.no_grad():
        return module.loss_per_item(batch())


def test_at_the_start_the_networks_are_as_they_were(tiny_config: dict, tiny_networks: dict):
    plain, module = make(tiny_config, tiny_networks, None), make(tiny_config, tiny_networks, EVERY)
    assert torch.equal(outputs(module), outputs(plain))
    for name, network in module.networks.items():
        assert network.state_dict().keys() == plain.networks[name].state_dict().keys()
    assert not torch.equal(outputs(randomized(module)), outputs(plain))


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_beside_the_weights_is_as_within_them(tiny_config: dict, tiny_networks: dict, alpha: float | None):
    """Every kind of layer, strided convolutions too; the scale is alpha / rank."""
    module = randomized(make(tiny_config, tiny_networks, {**EVERY, "rank": 3, "alpha": alpha}))
    parts = {name: network.state_dict() for name, network in module.networks.items()}
    merged = make(tiny_config, tiny_networks, None)
    for name, tensors in merge_lora(parts, module.lora.weights()).items():
        merged.networks[name].load_state_dict(dict(tensors))
    torch.testing.assert_close(outputs(module), outputs(merged), rtol=2e-5, atol=0)
    half = merge_lora(parts, module.lora.weights(), weight=0.5)["unet"]
    name = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    down, up, found = module.lora.weights()["unet"][name]
    assert found == (3.0 if alpha is None else 1.0)
    torch.testing.assert_close(
        half[f"{name}.weight"] - parts["unet"][f"{name}.weight"], up @ down * (found / 3 * 0.5)
    )


def test_only_the_chosen_layers_learn(tiny_config: dict, tiny_networks: dict):
    chosen = {"unet": ["attention"], "text_encoder": []}
    module = make(tiny_config, tiny_networks, {**chosen, "rank": 2})
    learning = {name for name, p in module.named_parameters() if p.requires_grad}
    layers = {name.removeprefix("lora.layers.unet.").rpartition(".")[0] for name in learning}
    names = [name for name, _ in module.networks["unet"].named_modules()]
    attention = [name for name in names if name.endswith(("to_q", "to_k", "to_v"))]
    outs = [name for name in names if name.endswith("to_out.0")]
    assert layers == {*attention, *outs} and len(attention) == 3 * len(outs) > 0
    frozen = make(tiny_config, tiny_networks, EVERY, unet=False)
    assert {n.split(".")[2] for n, p in frozen.named_parameters() if p.requires_grad} == {"text_encoder"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_moves_the_factors_alone(tiny_config: dict, tiny_networks: dict, checkpointing: bool):
    for part in ("unet", "text_encoder"):
        tiny_config[part]["params"]["use_checkpoint"] = checkpointing
    module = randomized(make(tiny_config, tiny_networks, EVERY))
    module.training_step(batch(), 0).backward()
    with_gradient = {name for name, p in module.named_parameters() if p.grad is not None}
    assert with_gradient == {f"lora.{name}" for name, _ in module.lora.named_parameters()}
    plain = randomized(make(tiny_config, tiny_networks, EVERY))
    plain.networks["unet"].use_checkpoint = plain.cond_stage_model.use_checkpoint = False
    plain.training_step(batch(), 0).backward()
    for mine, theirs in zip(module.lora.parameters(), plain.lora.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_the_gradient_is_that_of_the_weights(tiny_config: dict, tiny_networks: dict):
    """d loss / d up = scale * (d loss / d W) down^T."""
    module, plain = make(tiny_config, tiny_networks, EVERY), make(tiny_config, tiny_networks, None)
    for either in (module, plain):
        either.training_step(batch(), 0).backward()
    name = "middle_block.1.transformer_blocks.0.attn1.to_v"
    lora_layer: LoRALayer = module.lora.layers["unet"].get_submodule(name)
    gradient = plain.networks["unet"].get_submodule(name).weight.grad
    torch.testing.assert_close(
        lora_layer.up.grad, gradient @ lora_layer.down.detach().T, rtol=1e-4, atol=1e-8
    )
    assert lora_layer.down.grad.abs().max() == 0  # up is 0


def test_factors_stay_float32_beside_bfloat16(tiny_config: dict, tiny_networks: dict):
    exact = randomized(make(tiny_config, tiny_networks, EVERY))
    module = randomized(make(tiny_config, tiny_networks, EVERY | {"base_dtype": "bf16"}))
    assert {p.dtype for p in module.lora.parameters()} == {torch.float32}
    networks = (module.networks["unet"], module.cond_stage_model)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(outputs(module), outputs(exact), rtol=0.03, atol=0)


@pytest.mark.slow
def test_a_compiled_network_has_its_factors(tiny_config: dict, tiny_networks: dict):
    plain = randomized(make(tiny_config, tiny_networks, EVERY))
    module = randomized(make(tiny_config, tiny_networks, EVERY))
    module.networks["unet"].compile(backend="eager", dynamic=False)
    plain.training_step(batch(), 0).backward()
    module.training_step(batch(), 0).backward()
    for mine, theirs in zip(module.lora.parameters(), plain.lora.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_the_node_is_checked(tiny_config: dict):
    target = "ldm.training.latent_diffusion.LatentDiffusion"
    node = NODE | {"params": {"unet": ["attentoin"]}}
    with pytest.raises(UserError, match="attentoin"):
        check(
            {"model": {"target": target, "params": tiny_config | {"trainable": {"lora": node}}}},
            {"model": dict},
        )
    with pytest.raises(UserError, match="attentoin"):
        lora = LoRA(unet=["attentoin"])
        lora.attach({"unet": instantiate(tiny_config["unet"])})
    with pytest.raises(UserError, match="rank 0"):
        LoRA(rank=0)
