"""LoRA extraction: nothing of this rank comes nearer, and a LoRA's own product is found again."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.checkpoints.extract_lora import extract_lora, low_rank
from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import merge_lora, read_lora
from ldm.checkpoints.save import save_model
from ldm.commands import convert
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.models.lora import KINDS, LoRA, layer_names
from tests.factories import SCHEDULE

EVERY = ["attention", "feed_forward", "projections", "convolutions"]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 16, 3, 3), (16, 24, 1, 1)])
@pytest.mark.parametrize("rank", [1, 5, 999])
def test_the_error_is_the_tail_of_the_singular_values(shape: tuple[int, ...], rank: int):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    down, up, squared = low_rank(change, rank)
    values = torch.linalg.svdvals(change.flatten(1).double())
    r = min(rank, len(values))
    assert down.shape == (r, *shape[1:]) and up.shape == (shape[0], r, *[1] * (len(shape) - 2))
    product = (up.flatten(1).double() @ down.flatten(1).double()).reshape(shape)
    tail = float(values[r:].square().sum())
    assert float((product - change).square().sum()) == pytest.approx(tail, rel=1e-5, abs=1e-7)
    assert squared == pytest.approx(tail, rel=1e-5, abs=1e-7)


def saved(path: Path, state_dicts: dict, config: dict) -> Path:
    alphas_cumprod = make_alphas_cumprod(**SCHEDULE)
    about = {"alphas_cumprod": alphas_cumprod, "metadata": {"ldm.config": json.dumps(config)}}
    return save_model(path, state_dicts, dtype=torch.float32, **about)


def words(tuned: Path, base: Path, out: Path, *more: str) -> list[str]:
    return [str(tuned), str(out), "--extract_lora", str(base), "--dtype", "fp32", *more]


def test_a_loras_own_product_is_extracted(
    tiny_config: dict, tiny_networks: dict[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture
):
    plain = {name: network.state_dict() for name, network in tiny_networks.items()}
    base = saved(tmp_path / "base.safetensors", plain, tiny_config)
    lora = LoRA(rank=3, alpha=2.0, unet=EVERY, text_encoder=EVERY[:2])
    networks = copy.deepcopy(tiny_networks)
    lora.attach({name: networks[name] for name in ("unet", "text_encoder")})
    torch.manual_seed(0)
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.2)
    merged = {name: dict(tensors) for name, tensors in merge_lora(plain, lora.weights()).items()}
    tuned = saved(tmp_path / "tuned.safetensors", merged, tiny_config)
    out = convert.main(convert.parse(words(tuned, base, tmp_path / "out.safetensors", "--rank", "3")))
    assert "100.00% of the squared change; 0.00% is in other tensors" in capsys.readouterr().out
    found = open_model(base).state_dicts
    layers = read_lora(out, found)
    assert {name: set(inner) for name, inner in layers.items()} == {
        name: set(inner) for name, inner in lora.weights().items()
    }
    again = merge_lora(found, layers)
    for network in ("unet", "text_encoder"):
        for name, tensor in merged[network].items():
            torch.testing.assert_close(again[network][name].float(), tensor.float(), rtol=1e-4, atol=1e-5)


def test_what_no_lora_holds_is_said(
    tiny_config: dict, tiny_networks: dict[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture
):
    plain = {name: network.state_dict() for name, network in tiny_networks.items()}
    base = saved(tmp_path / "base.safetensors", plain, tiny_config)
    changed = {name: {key: x.clone() for key, x in tensors.items()} for name, tensors in plain.items()}
    layer, elsewhere = "middle_block.1.proj_in.weight", "time_embed.0.weight"
    changed["unet"][layer][0, 0] += 1.0
    changed["unet"][elsewhere][0, :3] += 1.0
    tuned = saved(tmp_path / "tuned.safetensors", changed, tiny_config)
    out = convert.main(convert.parse(words(tuned, base, tmp_path / "out.safetensors")))
    assert "1 layers: 25.00% of the squared change; 75.00% is in other tensors" in capsys.readouterr().out
    layers = read_lora(out, open_model(base).state_dicts)
    assert list(layers["unet"]) == [layer.removesuffix(".weight")] and not layers["text_encoder"]
    with pytest.raises(UserError, match="No layer of a LoRA differs.*as BASE"):
        convert.main(convert.parse(words(base, base, tmp_path / "out.safetensors")))


def test_extraction_is_refused_with_a_sentence():
    for more, message in [
        (["a", "b.safetensors", "--rank", "4"], "Only a LoRA has a rank"),
        (["a", "b", "--extract_lora", "c"], "written as a safetensors file"),
        (["a", "b.safetensors", "--extract_lora", "c", "--rank", "0"], "rank 0 is impossible"),
        (["a", "b.safetensors", "--extract_lora", "c", "--vae", "d"], "without a VAE"),
    ]:
        with pytest.raises(UserError, match=message):
            convert.parse(more)
    names = {"unet": layer_names(KINDS["unet"], EVERY)}
    for base, message in [({"a": 3 * [[0.0]]}, "has shape"), ({}, "The base has no `a`")]:
        theirs = {"unet": {name: torch.tensor(rows) for name, rows in base.items()}}
        with pytest.raises(UserError, match=f"{message}.*trained from as BASE"):
            extract_lora({"unet": {"a": torch.ones(2, 1)}}, theirs, rank=1, adaptable=names, where="b")
    theirs, tuned = ({"unet": {"a": torch.full((2, 1), value)}} for value in (0.0, torch.inf))
    with pytest.raises(UserError, match="`a` of the model or of its base has values that are not finite"):
        extract_lora(tuned, theirs, rank=1, adaptable=names, where="b")
