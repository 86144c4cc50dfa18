"""A vision-language model as judge and as writer of captions: Gemma 3 in small, and a scripted one."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from ldm.commands import caption, evaluate
from ldm.data.captions import CaptionReader
from ldm.errors import UserError
from ldm.evaluation import vision_language, vlm
from ldm.evaluation.captions import caption_of, question
from ldm.evaluation.protocol import GeneratedImage, SubjectPrompts
from ldm.evaluation.vision_language import VisionLanguageModel, expected_rating
from ldm.evaluation.vlm import VlmEvaluation
from ldm.pipeline import Sample
from tests.data.test_photo_check import noise
from tests.evaluation.tiny_gemma import save_tiny_gemma
from tests.factories import photos

PROMPTS = SubjectPrompts("a photo of sks dog", "a photo of a dog", "sks", "dog")
RED, GREEN, BLUE = (Image.new("RGB", (8, 8), name) for name in ("red", "green", "blue"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def model(folder) -> VisionLanguageModel:
    return VisionLanguageModel(str(folder), device="cpu")


class Scripted:
    """Rates by colour: two images are the same where theirs is; a prompt that names it is met."""

    name = "scripted"

    def __init__(self, name: str | None = None, *, device: str | None = None):
        self.asked: list[tuple[str, int]] = []
        self.is_placed = False

    @contextmanager
    def placed(self) -> Iterator[None]:
        self.is_placed = True
        yield
        self.is_placed = False

    def rating_logits(self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Tensor:
        assert self.is_placed
        self.asked += [(text, len(shown)) for text, shown in zip(questions, images, strict=True)]
        return torch.stack([self.one(*pair) for pair in zip(questions, images, strict=True)])

    def one(self, text: str, images: Sequence[Image.Image]) -> Tensor:
        """3 or 4 with even chances where it is right, else 0 or 1 at 3 to 1."""
        colour = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}[images[-1].getpixel((0, 0))]
        same = images[0].getpixel((0, 0)) == images[-1].getpixel((0, 0))
        right = same if len(images) == 2 else colour in text
        shares = [0, 0, 0, 0.5, 0.5] if right else [0.75, 0.25, 0, 0, 0]
        return torch.tensor([math.log(share) if share else -1e9 for share in shares])


@pytest.fixture
def judge(monkeypatch) -> VlmEvaluation:
    monkeypatch.setattr(vlm, "shared_model", Scripted)
    return VlmEvaluation(seeds=2, batch_size=3)


def test_the_rating_is_the_mean_over_the_digits():
    """By hand: even chances are 2; 1 and 4 at 1 to 2 are 3; the likeliest digit alone would be 4."""
    logits = torch.tensor([[0.0] * 5, [-50, math.log(1), -50, -50, math.log(2)], [9.0, 9.0, -50, -50, -50]])
    assert expected_rating(logits).tolist() == pytest.approx([2, 3, 0.5], abs=1e-8)
    assert torch.allclose(expected_rating(logits + 7), expected_rating(logits))


def test_images_of_any_tool_are_rated_as_the_script_says(judge):
    """Photos are red and green, in turn; images red, red, green: same, not, not. Prompts: met, not, met."""
    samples = [GeneratedImage(RED, "a red sks dog"), GeneratedImage(RED, "a blue sks dog")]
    samples += [GeneratedImage(GREEN, "a green sks dog")]
    found = judge.measure_images(samples, subject=judge.subject([RED, GREEN]), prompts=PROMPTS, of_class=[])
    assert found["vlm_subject"] == pytest.approx((3.5 + 0.25 + 0.25) / 3, abs=1e-4)
    assert found["vlm_prompt"] == pytest.approx((3.5 + 0.25 + 3.5) / 3, abs=1e-4)
    low, high = found["intervals"]["vlm_subject"]
    assert low < found["vlm_subject"] < high and found["judge"] == "scripted"
    texts = [text for text, count in judge.rater.asked if count == 1]
    assert len(texts) == 3 and '"a red dog"' in texts[0] and not any("sks" in text for text in texts)
    bare = [GeneratedImage(RED, None)] * 2
    only = judge.measure_images(bare, subject=[RED], prompts=PROMPTS, of_class=[])
    assert only["vlm_subject"] == 3.5 and "vlm_prompt" not in only


def test_a_model_and_its_base_are_rated(judge, workdir):
    (workdir / "two.txt").write_text("a red {identifier} {class_word}\na blue {identifier} {class_word}\n")
    judge.prompts = "two.txt"

    def pipeline(colour: Image.Image):
        def draw(prompts, *, seeds, **settings):
            assert settings["steps"] == 50 and settings["progress"]
            assert not judge.rater.is_placed  # while images are drawn
            return [
                Sample(colour, torch.zeros(1), prompt, seed)
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]

        return draw

    subject = judge.subject([RED])
    after, base = (judge.measure(pipeline(c), subject=subject, prompts=PROMPTS) for c in (RED, GREEN))
    assert after.subject.shape == after.prompt.shape == (2, 2)
    found = judge.summary(after, base, subject)
    assert (found["vlm_subject"], found["vlm_prompt"]) == (3.5, (3.5 + 0.25) / 2)
    assert found["base"] == {"vlm_subject": 0.25, "vlm_prompt": 0.25}
    assert judge.score(found) == pytest.approx(3.5 / 4 * 1.875 / 4)
    assert found.keys() - {"intervals", "base", "sampling", "judge"} == judge.better.keys()


def test_gemma_in_small_reads_images_and_text(model):
    """Its logits at the last token, of a batch as of each alone; another image or question changes them."""
    asked = ["which?", "a longer question, which is padded?"]
    shown = [[noise(1), noise(2)], [noise(3), noise(4)]]
    together = model.rating_logits(asked, shown)
    alone = torch.cat([model.rating_logits([q], [images]) for q, images in zip(asked, shown, strict=True)])
    assert together.shape == (2, 5) and torch.allclose(together, alone, atol=1e-4)
    assert torch.equal(together, model.rating_logits(asked, shown))
    for other in (
        model.rating_logits(asked, [shown[0][::-1], shown[1]]),
        model.rating_logits(["what?", asked[1]], shown),
    ):
        assert not torch.allclose(other[0], together[0], atol=1e-4) and torch.allclose(
            other[1], together[1], atol=1e-4
        )


def test_the_digits_follow_the_beginning_of_the_answer(model, folder):
    """Against the whole of the logits, asked by hand."""
    processor = AutoProcessor.from_pretrained(folder)
    text = "<bos>user: <start_of_image>same?model: Rating: ("
    inputs = processor(text=[text], images=[[noise(1)]], return_tensors="pt", add_special_tokens=False)
    logits = model.network(**inputs).logits[0, -1]
    digits = [processor.tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(5)]
    found = model.rating_logits(["same?"], [[noise(1)]])
    assert torch.allclose(found[0], logits[digits], atol=1e-5)


def test_the_judges_of_a_run_are_one_model_which_leaves_the_gpu(folder, monkeypatch):
    """As on a GPU: the network goes there to be asked, and back, also after an error."""
    judges = [VlmEvaluation(model=str(folder), device="cpu", steps=steps) for steps in (5, 50)]
    model = judges[0].rater
    assert model is judges[1].rater and model.network.device.type == "cpu"
    assert vision_language.shared_model(str(folder), device="cpu") is model
    places: list[str] = []
    monkeypatch.setattr(model, "device", "cuda")
    monkeypatch.setattr(model.network, "to", places.append)
    monkeypatch.setattr(model, "rating_logits", lambda questions, images: torch.zeros(len(questions), 5))
    samples = [GeneratedImage(RED, "a red dog")] * 5
    about = {"subject": [RED], "prompts": PROMPTS, "of_class": []}
    assert judges[0].measure_images(samples, **about)["vlm_subject"] == 2
    assert places == ["cuda", "cpu"]
    monkeypatch.setattr(model, "rating_logits", lambda questions, images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        judges[1].measure_images(samples, **about)
    assert places == ["cuda", "cpu"] * 2


def test_a_model_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch, folder):
    with pytest.raises(UserError, match="not on this machine.*owner/absent.*where there is a network"):
        VisionLanguageModel("owner/absent")

    def gated(name, **options):
        response = type("Response", (), {"headers": {}, "request": None, "status_code": 403})()
        raise OSError("You are trying to access a gated repo.") from GatedRepoError(
            "gated", response=response
        )

    monkeypatch.setattr(vision_language.AutoProcessor, "from_pretrained", gated)
    with pytest.raises(UserError, match="gated.*https://huggingface.co/google/gemma-3-12b-it.*hf auth login"):
        VisionLanguageModel("google/gemma-3-12b-it")
    monkeypatch.undo()
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="no model of images and text") as caught:
        VisionLanguageModel(str(tmp_path))
    assert str(caught.value).count("\n") == 0


def test_the_default_is_what_fits(monkeypatch):
    assert vision_language.default_model("cpu") == vision_language.SMOL
    for gib, name in ((24, vision_language.SMOL), (80, vision_language.GEMMA)):
        about = type("Properties", (), {"total_memory": gib * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, about=about: about)
        assert vision_language.default_model("cuda:0") == name


@pytest.mark.parametrize(
    ("answer", "style", "expected"),
    [
        ("On a beach, at sunset.", "sentence", "S, On a beach, at sunset"),
        ("a photo of a dog sitting in snow", "sentence", "S, sitting in snow"),
        ('The dog, asleep\non a "red" {rug}', "sentence", "S, asleep on a red rug"),
        ("Here is the description: in a garden", "sentence", "S, in a garden"),
        ("", "sentence", "S"),
        ("beach, dog, sunset , brown dog, beach", "tags", "S, beach, sunset"),
        ("doghouse, lawn", "tags", "S, doghouse, lawn"),
    ],
)
def test_an_answer_becomes_a_caption(answer, style, expected):
    subject = "a photo of sks dog"
    found = caption_of(answer, subject, class_word="dog", style=style)
    assert found == expected.replace("S", subject, 1)


@pytest.mark.parametrize(
    ("answer", "style", "expected"),
    [
        ("a photo of a stuffed animal on a shelf", "sentence", "S, on a shelf"),
        ("shelf, stuffed animal, animal print rug", "tags", "S, shelf, animal print rug"),
    ],
)
def test_a_class_of_several_words_is_not_named_twice(answer, style, expected):
    subject = "a photo of sks stuffed animal"
    found = caption_of(answer, subject, class_word="stuffed animal", style=style)
    assert found == expected.replace("S", subject, 1)


def test_captions_are_written_once_and_shown(workdir, folder, monkeypatch, capsys):
    photos_of = photos(workdir / "subject")
    (photos_of / "1.txt").write_text("my own sks disc")
    asked = []

    def answer(self, questions, images, *, max_tokens):
        asked.append((list(questions), [[image.size for image in shown] for shown in images]))
        return [f"number {len(asked)} by the sea" for _ in questions]

    monkeypatch.setattr(VisionLanguageModel, "answer", answer)
    words = [
        str(photos_of),
        "--class_word",
        "disc",
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--batch_size",
        "2",
    ]
    sheet = caption.main(caption.parse([*words, "--language", "German"]))
    texts = {path.name: path.read_text().strip() for path in photos_of.glob("*.txt")}
    assert texts == {
        "0.txt": "a photo of sks disc, number 1 by the sea",
        "1.txt": "my own sks disc",
        "2.txt": "a photo of sks disc, number 1 by the sea",
        "3.txt": "a photo of sks disc, number 2 by the sea",
    }
    assert [len(questions) for questions, _ in asked] == [2, 1] and "German" in asked[0][0][0]
    assert "1 of 4 photos have a caption, which stays" in capsys.readouterr().out
    with Image.open(sheet) as image:
        assert (
            "my own sks disc" in image.info["dreambooth"]
            and "number 2 by the sea" in image.info["dreambooth"]
        )
    caption.main(caption.parse(words))
    assert len(asked) == 2 and sheet.parent == Path("logs")
    (photos_of / "2.txt").unlink()
    with pytest.raises(UserError, match="among the photos"):
        caption.main(caption.parse([*words, "--out", str(photos_of / "sheet.png")]))
    assert len(asked) == 2 and not (photos_of / "2.txt").exists()  # before any work


def by_the_sea(monkeypatch: pytest.MonkeyPatch, answered: list[int]) -> None:
    """A model that needs no weights; `answered` gets how many photos it was asked of at a time."""

    class Sea:
        placed = staticmethod(nullcontext)

        def __init__(self, name: str | None, *, device: str | None):
            pass

        def answer(self, questions: Sequence[str], images: Sequence, *, max_tokens: int) -> list[str]:
            answered.append(len(questions))
            return ["by the sea" for _ in questions]

    monkeypatch.setattr("ldm.runs.caption_photos.VisionLanguageModel", Sea)


@pytest.mark.parametrize(
    "name, content, shown",
    [
        ("1.txt", "my own {identifier} {class_word}\n", "my own sks disc"),
        ("1.caption", "my own  sks disc", "my own sks disc"),
        ("1.json", '{"captions": ["my sks disc", "sks asleep"]}', "my sks disc | sks asleep"),
        ("metadata.jsonl", '{"file_name": "1.jpg", "text": "my sks disc"}', "my sks disc"),
        (
            "metadata.jsonl",
            '{"file_name": "1.jpg", "text": "my sks disc"}\n{"file_name": "1.jpg", "text": "sks asleep"}',
            "my sks disc | sks asleep",
        ),
    ],
)
def test_a_caption_that_training_reads_is_kept(workdir, monkeypatch, capsys, name, content, shown):
    photos_of, answered = photos(workdir / "subject"), []
    (photos_of / name).write_text(content)
    by_the_sea(monkeypatch, answered)
    words = [str(photos_of), "--class_word", "disc"]
    sheet = caption.main(caption.parse(words))
    written = {"0.txt", "2.txt", "3.txt"} | ({name} if name == "1.txt" else set())
    assert {path.name for path in photos_of.glob("*.txt")} == written and sum(answered) == 3
    assert (photos_of / name).read_text() == content
    assert "1 of 4 photos have a caption, which stays" in capsys.readouterr().out
    read = CaptionReader(True, photos_of, {"identifier": "sks", "class_word": "disc"})
    assert " | ".join(read(photos_of / "1.jpg").texts) == shown
    with Image.open(sheet) as image:
        prompts = json.loads(image.info["dreambooth"])["prompts"]
    rest = [f"{k}: a photo of sks disc, by the sea" for k in ("0.png", "2.png", "3.webp")]
    assert prompts == [rest[0], f"1.jpg: {shown}", *rest[1:]]
    caption.main(caption.parse(words))
    assert sum(answered) == 3  # none is left to do


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("1.txt", b" \n", "caption is empty.*1.txt"),
        ("1.caption", b"a {thing}", "Unknown placeholder"),
        ("1.json", b'{"width": 3}', "holds no caption.*1.json"),
        ("metadata.jsonl", b"{", "JSON cannot be read.*metadata.jsonl:1"),
        ("photo.txt", None, "name of a file of captions.*photo.txt"),
    ],
)
def test_captions_that_training_refuses_are_refused_before_the_model(
    workdir, monkeypatch, name, content, message
):
    photos_of = photos(workdir / "subject")
    (photos_of / name).write_bytes((photos_of / "0.png").read_bytes() if content is None else content)
    before = {path.name: path.read_bytes() for path in photos_of.iterdir()}
    monkeypatch.setattr("ldm.runs.caption_photos.VisionLanguageModel", None)
    with pytest.raises(UserError, match=message):
        caption.main(caption.parse([str(photos_of), "--class_word", "disc"]))
    assert {path.name: path.read_bytes() for path in photos_of.iterdir()} == before


def test_photos_of_one_stem_share_their_file_and_what_is_written_meanwhile_stays(workdir, monkeypatch):
    photos_of = photos(workdir / "subject")
    RED.save(photos_of / "0.bmp")
    by_the_sea(monkeypatch, [])

    def meanwhile(*args, **options):
        (photos_of / "3.caption").write_text("mine: sks disc")
        return "a photo of sks disc, by the sea"

    monkeypatch.setattr("ldm.evaluation.captions.caption_of", meanwhile)
    caption.main(caption.parse([str(photos_of), "--class_word", "disc", "--batch_size", "5"]))
    assert {path.name for path in photos_of.glob("*.txt")} == {"0.txt", "1.txt", "2.txt"}
    assert (photos_of / "3.caption").read_text() == "mine: sks disc"


def test_gemma_in_small_writes_captions(workdir, folder, model):
    """Greedy, so the same again; in one batch or in several."""
    asked = question("disc", style="tags", language="English")
    answers = model.answer([asked, "what?"], [[noise(1)], [noise(2)]], max_tokens=4)
    assert answers == [
        model.answer([q], [[noise(k)]], max_tokens=4)[0] for q, k in ((asked, 1), ("what?", 2))
    ]


def test_the_command_judges_folders_of_any_tool(workdir, folder, monkeypatch, capsys):
    photos_of, given = photos(workdir / "subject"), workdir / "given"
    given.mkdir()
    for k in range(3):
        noise(k, (32, 32)).save(given / f"{k}.png")
        (given / f"{k}.txt").write_text("a sks disc in the snow")
    words = ["--pictures", str(given), "--data_root", str(photos_of), "--class_word", "disc"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words, "--metrics", "vlm", "--vlm", str(folder)])
    evaluate.main(evaluate.parse())
    said = capsys.readouterr().out
    assert (
        "vlm_subject" in said and "vlm_prompt" in said and Path("logs/evaluation-given/figures.svg").exists()
    )
