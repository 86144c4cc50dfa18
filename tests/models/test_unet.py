import math

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.models.conditioning import Conditioning
from ldm.models.unet import ResBlock, UNetModel, timestep_embedding
from tests.checkpoints import sd_v1

TINY = {
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_heads": 2,
    "context_dim": 12,
    "num_groups": 8,
}


def build(**params) -> UNetModel:
    torch.manual_seed(0)
    unet = UNetModel(**{**TINY, **params})
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x, context = torch.randn(2, 4, 8, 6), torch.randn(2, 7, 12)  # the same numbers in every dtype
    return x.to(dtype), torch.tensor([3, 700]), context.to(dtype)


def predict(unet: UNetModel, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """For `inputs`, each with a context of its own."""
    x, timesteps, context = inputs(dtype)
    return unet(x, timesteps, Conditioning(context))


def test_sd1_names_and_counts():
    with torch.device("meta"):
        state = UNetModel().state_dict()
    assert set(state) == set(sd_v1.unet())
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (686, 859_520_964)
    assert state["input_blocks.1.1.proj_in.weight"].shape == (320, 320, 1, 1)


def test_sd2_names_and_counts():
    with torch.device("meta"):
        unet = UNetModel(num_head_channels=64, use_linear_in_transformer=True, context_dim=1024)
    state = unet.state_dict()
    assert set(state) == set(sd_v1.unet())
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (686, 865_910_724)
    assert state["input_blocks.1.1.proj_in.weight"].shape == (320, 320)
    blocks = (unet.input_blocks[1][1], unet.input_blocks[4][1], unet.input_blocks[7][1], unet.middle_block[1])
    assert [block.transformer_blocks[0].attn2.num_heads for block in blocks] == [5, 10, 20, 20]


def test_epsilons_of_the_norms():
    """1e-5 everywhere but at the entrance of the transformers."""
    norms = {name: m.eps for name, m in build().named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    assert len(norms) == 33
    assert norms == {name: 1e-6 if name.endswith(".norm") else 1e-5 for name in norms}


def test_timestep_embedding():
    embedding = timestep_embedding(torch.tensor([0, 1, 999]), 8)
    frequencies = [10000 ** (-i / 4) for i in range(4)]
    expected = [[f(t * w) for f in (math.cos, math.sin) for w in frequencies] for t in (0, 1, 999)]
    torch.testing.assert_close(embedding, torch.tensor(expected), rtol=0, atol=1e-4)


def test_timesteps_are_embedded_in_float32_whatever_the_default_dtype_is():
    """Lightning makes it bfloat16 in a step of `bf16-true`, in which 999 is 1000."""
    t = torch.tensor([0, 1, 20, 999])
    before = timestep_embedding(t, 320)
    torch.set_default_dtype(torch.bfloat16)
    try:
        within = timestep_embedding(t, 320)
    finally:
        torch.set_default_dtype(torch.float32)
    assert within.dtype == torch.float32 and torch.equal(within, before)


@torch.no_grad()
def test_a_fresh_network_predicts_zero_and_its_blocks_are_the_identity():
    unet = UNetModel(**TINY)
    assert not predict(unet).any()
    block = ResBlock(16, 16, emb_channels=8, num_groups=8)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 16)), x)


def test_weights_are_channels_last_and_either_layout_loads():
    """On the meta device too; a file's plain layout fills them without changing it."""
    unet = build()
    kernels = [p for p in unet.parameters() if p.ndim == 4 and p.shape[2] == 3]
    layout = torch.contiguous_format
    plain = {name: tensor.clone(memory_format=layout) for name, tensor in unet.state_dict().items()}
    unet.load_state_dict(plain)
    with torch.device("meta"):
        kernels += [p for p in UNetModel(**TINY).parameters() if p.ndim == 4 and p.shape[2] == 3]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize("chosen", [True, [2]], ids=["all", "some"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradient_checkpointing_changes_nothing(mode, chosen):
    """Output and every gradient, input and context included, to the bit; the frozen parts stay without."""
    results = []
    for use_checkpoint in (False, chosen):
        unet = getattr(build(use_checkpoint=use_checkpoint), mode)()
        unet.input_blocks[0].requires_grad_(False)
        x, timesteps, context = inputs()
        context.requires_grad_()
        output = unet(x, timesteps, Conditioning(context))
        output.square().sum().backward()
        gradients = {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}
        assert all(gradient is not None for gradient in gradients.values())
        results.append({"output": output, "context": context.grad, **gradients})
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    assert [name for name in plain if not torch.equal(plain[name], checkpointed[name])] == []


def test_gradient_checkpointing_keeps_fewer_activations():
    def kept_bytes(use_checkpoint: bool | list[int]) -> int:
        sizes = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        unet = build(use_checkpoint=use_checkpoint)
        weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = predict(unet)
        assert output.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    assert kept_bytes(True) == kept_bytes([1, 2]) < 0.5 * kept_bytes(False)
    assert all(kept_bytes(True) < kept_bytes([factor]) < kept_bytes(False) for factor in (1, 2))


@torch.no_grad()
def test_each_item_is_computed_by_itself():
    unet = build()
    x, timesteps, context = inputs()
    both = unet(x, timesteps, Conditioning(context))
    alone = unet(x[1:], timesteps[1:], Conditioning(context[1:]))
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-5)
    assert (both - unet(x, timesteps.flip(0), Conditioning(context))).abs().max() > 1e-2


def guided(unet: UNetModel, rows: list[int]) -> list[torch.Tensor]:
    """Output of two latents under two prompts each, and all gradients."""
    x, timesteps, context = inputs(torch.float64)
    context.requires_grad_()
    output = unet.predict(x, timesteps, Conditioning(context[rows]))
    output.square().sum().backward()
    return [output.detach(), context.grad, *(p.grad for p in unet.parameters())]


@pytest.mark.parametrize("resolutions", [(2,), (1, 2), ()], ids=["second", "all", "middle"])
@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("rows", [[0, 0, 1, 1], [1, 1, 0, 1]], ids=["runs", "mixed"])
def test_items_of_one_latent_share_what_comes_before_the_prompt(resolutions, use_checkpoint, rows):
    """As if each item had latents of its own."""
    options = {"attention_resolutions": resolutions, "use_checkpoint": use_checkpoint}
    unet, plain = (build(**options).double() for _ in range(2))
    x, timesteps, context = inputs(torch.float64)
    context.requires_grad_()
    expected = plain(torch.cat([x, x]), torch.cat([timesteps, timesteps]), Conditioning(context[rows]))
    expected.square().sum().backward()
    found = guided(unet, rows)
    assert found[0].shape == (4, 4, 8, 6)
    references = [expected.detach(), context.grad, *(p.grad for p in plain.parameters())]
    for one, other in zip(found, references, strict=True):
        assert (one - other).abs().max() <= 1e-10 * other.abs().max()


@torch.no_grad()
def test_what_is_shared_is_computed_once():
    unet, seen = build(), {}
    first, transformer = unet.input_blocks[1][0], unet.input_blocks[3][1].transformer_blocks[0]
    layers = {"block": first, "self": transformer.attn1, "cross": transformer.attn2}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (len(inputs[0]), len(output))})
        )
    x, timesteps, context = inputs()
    unet(x, timesteps, Conditioning(context[[0, 0, 1, 1, 0, 0]]))
    assert seen == {"block": (2, 2), "self": (2, 2), "cross": (6, 6)}


@torch.no_grad()
def test_half_precision_and_autocast_follow_float32():
    unet = build()
    expected = predict(unet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = predict(unet)
    half = predict(unet.to(torch.bfloat16), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for output in (autocast, half):
        assert (output.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_latents_that_cannot_be_halved_are_refused():
    with pytest.raises(UserError, match="7 x 6 cells .*multiples of 2"):
        build()(torch.randn(1, 4, 7, 6), torch.tensor([0]), Conditioning(torch.randn(1, 7, 12)))


@pytest.mark.parametrize("use_linear", [False, True])
@pytest.mark.parametrize("rows", [None, [0, 0, 1, 1], [1, 1, 0, 1]], ids=["own", "runs", "mixed"])
@torch.no_grad()
def test_prepared_contexts_and_timesteps_predict_the_same(rows, use_linear):
    """To rounding, as embeddings of all timesteps are one product; keys and values are computed once."""
    unet = build(use_linear_in_transformer=use_linear, attention_resolutions=(1, 2)).double()
    x, _, contexts = inputs(torch.float64)
    rows = [0, 1] if rows is None else rows
    own, told = Conditioning(contexts), Conditioning(contexts[rows])
    counted = []
    for name, layer in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "emb_layers.1", "time_embed.2")):
            layer.register_forward_hook(lambda *_, name=name: counted.append(name))
    expected = [unet.predict(x, torch.tensor([t, t]), told) for t in (901, 3, 444)]
    each = len(counted) // 3
    counted.clear()
    prepared = unet.prepare(own, torch.tensor([901, 444, 3]))
    assert len(counted) == len(set(counted)) == each
    for t, wanted in zip((901, 3, 444), expected, strict=True):
        found = unet.predict(x, torch.tensor([t, t]), prepared.select(rows))
        assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert len(counted) == each
    both = unet.predict(x, torch.tensor([901, 3]), prepared.select(rows))
    wanted = unet.predict(x, torch.tensor([901, 3]), told)
    assert (both - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    between = unet.prepare(own, torch.tensor([901.25, 444.5])).select(rows)
    found = unet.predict(x, torch.tensor([444.5, 901.25]), between)
    wanted = unet.predict(x, torch.tensor([444.5, 901.25]), told)
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert (found - unet.predict(x, torch.tensor([444, 901]), told)).abs().max() > 1e-6
    for unknown in (445, 902, 444.5):
        with pytest.raises((IndexError, RuntimeError)):
            unet.predict(x, torch.tensor([unknown, unknown]), prepared.select(rows))


def test_a_vector_of_an_item_is_not_ignored():
    x, timesteps, context = inputs()
    told = Conditioning(context, vector=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="no vector"):
        build()(x, timesteps, told)
