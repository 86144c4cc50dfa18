"""The text encoder learns what captions say, and leaves as a part of a Stable Diffusion file."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from ldm.checkpoints.load import load_state_dicts, open_model
from ldm.config import instantiate, load_config, to_container
from ldm.shipped import find_file
from ldm.storybook.dataset import StorybookDataset
from ldm.storybook.training.text_encoder import TextEncoderTask
from ldm.storybook.world import ATTRIBUTES, full_caption, sample_scene

CONFIG = Path(__file__).resolve().parents[2] / "configs/storybook/text_encoder.yaml"


def shipped_node() -> dict:
    return to_container(load_config([CONFIG]))["model"]["params"]["text_encoder"]


def small_task() -> TextEncoderTask:
    node = shipped_node()
    node["params"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return TextEncoderTask(text_encoder=node)


def test_it_reads_the_class_after_a_few_steps():
    task = small_task()
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    batches = DataLoader(StorybookDataset(seed=3, pictures=False), batch_size=32, sampler=range(32 * 60))
    for batch in batches:
        optimizer.zero_grad()
        logits = task.read(batch["caption"])
        torch.nn.functional.cross_entropy(logits["class_word"], batch["labels"]["class_word"]).backward()
        optimizer.step()
    scenes = [sample_scene(10**12 + k) for k in range(64)]
    read = task.read([full_caption(scene) for scene in scenes])["class_word"].argmax(1)
    assert (read == torch.tensor([scene.labels()["class_word"] for scene in scenes])).float().mean() > 0.9


def test_its_loss_counts_every_attribute():
    task = small_task()
    batch = next(iter(DataLoader(StorybookDataset(seed=3, pictures=False), batch_size=4, sampler=range(4))))
    task.log = lambda *args, **kwargs: None  # there is no Trainer to log to
    loss = task.training_step(batch, 0)
    logits = task.read(batch["caption"])
    by_hand = sum(-logits[name].log_softmax(1)[range(4), batch["labels"][name]].mean() for name in ATTRIBUTES)
    torch.testing.assert_close(loss, by_hand)


def test_it_leaves_without_its_heads(tmp_path: Path):
    task = small_task()
    path = task.export(tmp_path / "tower.safetensors", dtype=torch.float32, metadata={})
    tensors = load_file(path)
    assert all(name.startswith("cond_stage_model.transformer.text_model.") for name in tensors)
    again = small_task()
    parts = open_model(path).state_dicts
    load_state_dicts(
        {"text_encoder": again.text_encoder}, {"text_encoder": parts["text_encoder"]}, where=path
    )
    ids = task.text_encoder.tokenize(["a photo of a dog"])
    torch.testing.assert_close(again.text_encoder(ids), task.text_encoder(ids))


def test_the_shipped_tower_tells_captions_apart():
    """Every attribute that a caption names moves the context of the padding."""
    path = find_file("ldm/storybook/assets/text_encoder.safetensors")
    text_encoder = instantiate(shipped_node()).eval()
    load_state_dicts(
        {"text_encoder": text_encoder},
        {"text_encoder": open_model(path).state_dicts["text_encoder"]},
        where=path,
    )
    said = "a photo of a spotted red and white dog with floppy ears and a green collar on the moon"
    others = [("spotted", "striped"), ("red", "blue"), ("white", "black"), ("dog", "cat")]
    others += [("floppy", "pointy"), ("green", "yellow"), ("on the moon", "in the snow")]
    with torch.inference_mode():
        last = text_encoder(text_encoder.tokenize([said, *(said.replace(*pair) for pair in others)]))[:, -1]
    assert (last[1:] - last[0]).norm(dim=1).min() > 0.1 * last[0].norm()
