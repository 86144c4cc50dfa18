"""The paper's metrics on small networks of random weights, against references written apart."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.multimodal import CLIPScore
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)

from ldm.annotations import fits
from ldm.data.buckets import Shape
from ldm.errors import UserError
from ldm.evaluation.features import IMAGENET, OPENAI, Clip, Dino, Lpips, prepare
from ldm.evaluation.image_folder import read_image_folder
from ldm.evaluation.photos import PhotoEvaluation, diversity, mean_of_pairs, without
from ldm.evaluation.protocol import GeneratedImage, SubjectPrompts, sides_of
from ldm.pipeline import Sample
from ldm.runs.sampling import in_shapes

TOKENIZER = Path(__file__).resolve().parents[2] / "ldm/storybook/assets/tokenizer"
SIZE = inspect.signature(PhotoEvaluation).parameters["size"].annotation
PROMPTS = SubjectPrompts("a photo of sks dog", "a photo of a dog", "sks", "dog")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a DINO and a CLIP of 32 channels; DINO sees 48 pixels, CLIP 32."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("networks")
    ViTModel(ViTConfig(**size, image_size=48, patch_size=16), add_pooling_layer=False).save_pretrained(
        folder / "dino"
    )
    text = CLIPTextConfig(**size, vocab_size=651, bos_token_id=649, eos_token_id=650)
    vision = CLIPVisionConfig(**size, image_size=32, patch_size=8)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    ).save_pretrained(folder / "clip")
    CLIPTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "clip")
    return {name: str(folder / name) for name in ("dino", "clip")}


@pytest.fixture(scope="module")
def evaluation(networks: dict[str, str]) -> PhotoEvaluation:
    return PhotoEvaluation(**networks, seeds=2, class_samples=3, steps=1, diversity=False, device="cpu")


def photo(seed: int, size: tuple[int, int] = (60, 44)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


class Drawer:
    """Draws noise: a function of the prompt and the seed."""

    def __call__(self, prompts: Sequence[str], *, seeds: Sequence[int], **settings: object) -> list[Sample]:
        return [
            Sample(photo(seed * 1000 + len(prompt)), torch.zeros(4, 2, 2), prompt, seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a, b) / a.norm() / b.norm())


def test_pictures_are_prepared_as_torchvision_and_clip_do(networks: dict[str, str]):
    """To a level of 8 bits, as resizers round differently; both crop the same where the margin is even."""
    processor = CLIPImageProcessorPil.from_pretrained(networks["clip"])
    for k, size in enumerate([(60, 45), (45, 60), (32, 32), (101, 40)]):
        theirs = torch.as_tensor(processor(photo(k, size), return_tensors="pt").pixel_values[0])
        ours = prepare([photo(k, size)], resize=32, crop=32, normal=OPENAI)[0]
        assert (ours - theirs).abs().max() < 2 / 255 / min(OPENAI[1])


def test_embeddings_are_the_networks_own(networks: dict[str, str]):
    images = [photo(k) for k in range(3)]
    ours, network = (
        Clip(networks["clip"]).embed_images(images),
        CLIPModel.from_pretrained(networks["clip"]).eval(),
    )
    with torch.no_grad():
        hidden = network.vision_model(prepare(images, resize=32, crop=32, normal=OPENAI)).pooler_output
        theirs = network.visual_projection(hidden)
    assert torch.allclose(ours, theirs / theirs.norm(dim=1, keepdim=True), atol=1e-6)


def test_dino_sees_the_middle_of_a_picture_a_seventh_larger():
    image = Image.new("RGB", (256, 320), "red")
    image.paste("blue", (16, 48, 240, 272))
    seen = prepare([image], resize=256, crop=224, normal=IMAGENET)[0]
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    blue = (torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1) - mean) / deviation
    assert seen.shape == (3, 224, 224) and torch.allclose(seen, blue.expand_as(seen), atol=1e-6)


def test_every_figure_is_a_mean_over_all_pairs(evaluation: PhotoEvaluation):
    photos, drawn = [photo(k) for k in range(3)], [photo(10 + k) for k in range(4)]
    of_class = [photo(20 + k) for k in range(2)]
    texts = ["a sks dog in the snow", "a sks dog"] * 2
    plain = evaluation.measure_images(
        [GeneratedImage(image, text) for image, text in zip(drawn, texts, strict=True)],
        subject=evaluation.subject(photos),
        prompts=PROMPTS,
        of_class=[GeneratedImage(image, None) for image in of_class],
    )
    dino, clip = evaluation.dino, evaluation.clip

    def pairs(network: Dino | Clip, one: Sequence, other: Sequence) -> float:
        values = [
            cosine(network.embed_images([a])[0], network.embed_images([b])[0]) for a in one for b in other
        ]
        return sum(values) / len(values)

    assert plain["dino"] == pytest.approx(pairs(dino, drawn, photos), abs=1e-4)
    assert plain["clip_i"] == pytest.approx(pairs(clip, drawn, photos), abs=1e-4)
    assert plain["pres"] == pytest.approx(pairs(dino, of_class, photos), abs=1e-4)
    named = ["a dog in the snow", "a dog"] * 2
    values = [
        cosine(clip.embed_images([i])[0], clip.embed_texts([t])[0]) for i, t in zip(drawn, named, strict=True)
    ]
    assert plain["clip_t"] == pytest.approx(sum(values) / 4, abs=1e-4)


def test_clip_t_is_torchmetrics_clip_score(evaluation: PhotoEvaluation, networks: dict[str, str]):
    """Of pictures of the network's own size, which no resizer touches."""
    images, text = [photo(k, (32, 32)) for k in range(3)], "a photo of a dog"
    network = CLIPModel.from_pretrained(networks["clip"]).eval()

    class Plain(torch.nn.Module):
        """What torchmetrics calls: transformers 5 wraps the features that it wants bare."""

        config, device = network.config, torch.device("cpu")

        def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
            return network.get_image_features(pixels).pooler_output

        def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return network.get_text_features(ids, attention_mask=mask).pooler_output

    processor = CLIPProcessor.from_pretrained(networks["clip"])
    theirs = CLIPScore(model_name_or_path=lambda: (Plain(), processor))
    ours = evaluation.clip.embed_images(images) @ evaluation.clip.embed_texts([text])[0]
    for image, mine in zip(images, ours.tolist(), strict=True):
        theirs.update(torch.from_numpy(np.array(image)).permute(2, 0, 1), text)
        assert float(theirs.score) / 100 == pytest.approx(mine, abs=1e-5)
        theirs.reset()


def test_mean_of_pairs_leaves_each_row_itself_out():
    rows = torch.nn.functional.normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    values = [cosine(rows[i], rows[j]) for i in range(5) for j in range(5) if i != j]
    assert mean_of_pairs(rows) == pytest.approx(sum(values) / 20, abs=1e-6)


def test_a_model_is_drawn_from_by_the_protocol(evaluation: PhotoEvaluation):
    subject = evaluation.subject([photo(k) for k in range(3)])
    base = evaluation.measure(Drawer(), subject=subject, prompts=PROMPTS)
    metrics = evaluation.summary(base, base, subject)
    assert base.dino.shape == base.clip_i.shape == base.clip_t.shape == (2, 25) and base.pres.shape == (3,)
    assert metrics["dino"] == metrics["base"]["dino"] and -1 <= metrics["dino"] <= 1
    assert metrics["intervals"]["clip_t"].low <= metrics["clip_t"] <= metrics["intervals"]["clip_t"].high
    assert metrics["ceiling"]["dino"] == pytest.approx(mean_of_pairs(subject.dino), abs=1e-4)
    assert evaluation.score(metrics) == pytest.approx(metrics["dino"], abs=1e-6)  # the base's own, undrifted


def lpips(*, batch_size: int = 2) -> tuple[Lpips, list[tuple[int, ...]]]:
    """Mean differences in place of AlexNet's, and the shapes of the batches that it is handed."""
    stand_in, seen = Lpips.__new__(Lpips), []

    def network(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(one.shape))
        return (one - other).abs().mean((1, 2, 3)).view(-1, 1, 1, 1)

    stand_in.network, stand_in.device, stand_in.batch_size = network, "cpu", batch_size
    return stand_in, seen


def test_distances_are_those_of_each_pair_whatever_the_sizes():
    stand_in, seen = lpips()
    sizes = [(8, 6), (4, 4), (8, 6), (8, 6), (4, 4)]
    pairs = [(Image.new("L", size, 0), Image.new("L", size, 51 * k)) for k, size in enumerate(sizes)]
    assert stand_in(pairs).tolist() == pytest.approx([0.4 * k for k in range(5)], abs=1e-6)
    assert seen == [(2, 3, 6, 8), (1, 3, 6, 8), (2, 3, 4, 4)]


def test_diversity_pairs_images_of_one_size():
    """By hand: two pairs of one prompt, one of another; a prompt without any has no part in it."""

    def grey(level: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
        return Image.new("L", size, 51 * level)

    groups = {
        "two pairs": [grey(0), grey(1, (6, 8)), grey(1), grey(4, (6, 8))],
        "one pair": [grey(2), grey(4), grey(1, (6, 8))],
        "none": [grey(0), grey(5, (6, 8))],
    }
    stand_in, _ = lpips()
    assert diversity(groups, stand_in).tolist() == pytest.approx([(0.4 + 1.2) / 2, 0.8], abs=1e-6)
    assert diversity({"none": groups["none"], "one": [grey(0)]}, stand_in) is None
    assert diversity({}, stand_in) is None


@pytest.mark.parametrize("shapes, has_div", [([Shape(44, 60), Shape(60, 44)], True), (4, False)])
def test_samples_in_buckets_are_measured(networks: dict[str, str], shapes: list[Shape] | int, has_div: bool):
    """Seeds in turn have the buckets' shapes, so that of four shapes no two samples are alike."""
    shapes = [Shape(32, 32 + 4 * k) for k in range(shapes)] if isinstance(shapes, int) else shapes
    evaluation = PhotoEvaluation(**networks, seeds=4, class_samples=4, steps=1, diversity=False, device="cpu")
    evaluation.lpips, _ = lpips()

    def draw(prompts: Sequence[str], *, seeds: Sequence[int], height: int, width: int, **how: object):
        size = (width, height)
        return [Sample(photo(s, size), torch.zeros(1), p, s) for p, s in zip(prompts, seeds, strict=True)]

    subject = evaluation.subject([photo(k) for k in range(2)])
    found = evaluation.measure(in_shapes(draw, shapes), subject=subject, prompts=PROMPTS, is_base=True)
    metrics = evaluation.summary(found, found, subject)
    assert ("div" in metrics, "div" in metrics["base"]) == (has_div, has_div)
    assert found.dino.shape == (4, 25) and metrics["noise_floor"]["class_shift_frechet"] > 0


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("a sks dog", "a dog"), ("SKS", ""), ("a photo of sks dog in snow", "a photo of dog in snow")],
)
def test_clip_is_not_asked_for_the_identifier(prompt: str, said: str):
    assert without(prompt, "sks") == said


def test_what_cannot_be_had_is_said(networks: dict[str, str], tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hf download facebook/dino-vits16"):
        Dino(str(tmp_path / "dino"))
    with pytest.raises(UserError, match="of another model: .* weights are missing"):
        Dino(networks["clip"])


def test_folders_of_plain_pictures(tmp_path: Path):
    for k in range(3):
        photo(k).save(tmp_path / f"{k}.png")
    assert [picture.prompt for picture in read_image_folder(tmp_path)] == [None] * 3
    with pytest.raises(UserError, match="too few, 5 are needed"):
        read_image_folder(tmp_path, at_least=5)
    (tmp_path / "0.txt").write_text("a dog\n")
    with pytest.raises(UserError, match="1.png has none"):
        read_image_folder(tmp_path)
    for k in range(3):
        (tmp_path / f"{k}.txt").write_text(f"dog {k}")
    assert [picture.prompt for picture in read_image_folder(tmp_path)] == ["dog 0", "dog 1", "dog 2"]
    photo(3, (30, 30)).save(tmp_path / "3.png")
    (tmp_path / "3.txt").write_text("a dog")
    with pytest.raises(UserError, match="differ in size: .* 60 x 44, 3.png 30 x 30"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize(
    "size, sides", [(None, (None, None)), (512, (512, 512)), ([768, 512], (768, 512)), ((64, 96), (64, 96))]
)
def test_samples_have_a_side_or_both(size: int | Sequence[int] | None, sides: tuple):
    assert sides_of(size) == {"height": sides[0], "width": sides[1]}
    assert fits(list(size) if isinstance(size, tuple) else size, SIZE)
    assert not any(fits(wrong, SIZE) for wrong in ([512], [512, 512, 512], [0, 512], 0, "512"))
