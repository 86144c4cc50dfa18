"""Files of trained adapters: the LyCORIS library reads them, and predicts what we do."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from torch import nn

from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import read_lora
from ldm.errors import UserError
from tests.factories import build_module
from tests.models.test_adapter import KINDS, build, prediction, randomized
from tests.parity.conftest import TOLERANCE, ours, relative, theirs
from tests.parity.test_lycoris import kohya


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_predicts_the_same_from_the_file(
    kind: str,
    pipe: StableDiffusionPipeline,
    tiny_config: dict,
    tiny_networks: dict[str, nn.Module],
    tiny_model_file: Path,
    tmp_path: Path,
):
    module = randomized(build(tiny_config, tiny_networks, kind))
    about = {"ldm.config": json.dumps(tiny_config)}
    model = module.export(tmp_path / "run" / "model.safetensors", dtype=torch.float32, metadata=about)
    merged = build_module(tiny_config, seed=7)
    for name, tensors in open_model(model).state_dicts.items():
        merged.networks[name].load_state_dict(dict(tensors))
    torch.testing.assert_close(prediction(merged), prediction(module), rtol=1e-4, atol=1e-5)
    file, plain = tmp_path / "run" / "loras" / "run.safetensors", theirs(pipe)
    with safe_open(file, "pt") as opened:
        keys, metadata = list(opened.keys()), opened.metadata()
    assert metadata["ss_network_module"] == "lycoris.kohya" and "ldm.config" not in metadata
    assert all(key.startswith(("lora_unet_", "lora_te_")) for key in keys) and len(keys) > 100
    kohya.LycorisNetworkKohya.apply_preset({"unet_target_module": [], "unet_target_name": []})  # of a class
    text_encoder = (
        nn.Module()
    )  # keys have the level `text_model`, as in all tools' files; transformers 5 has not
    text_encoder.text_model = pipe.text_encoder
    network, _ = kohya.create_network_from_weights(1.0, str(file), pipe.vae, text_encoder, pipe.unet)
    assert len(network.unet_loras) + len(network.text_encoder_loras) == len(module.lora.adapted())
    network.apply_to(text_encoder, pipe.unet, True, True)
    read = theirs(pipe)
    assert relative(ours(model, None), read) < TOLERANCE
    assert relative(plain, read) > 100 * TOLERANCE
    if kind in ("loha", "lokr"):
        assert relative(ours(tiny_model_file, file), read) < TOLERANCE
    else:
        with pytest.raises(UserError, match="not a plain LoRA"):
            read_lora(file, open_model(tiny_model_file).state_dicts)
