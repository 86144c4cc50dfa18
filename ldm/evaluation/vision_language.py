"""Models that read images and text, and answer: any `image-text-to-text` model of transformers."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from ldm.checkpoints.hub import explained
from ldm.errors import UserError

GEMMA, SMOL = "google/gemma-3-12b-it", "HuggingFaceTB/SmolVLM-500M-Instruct"
LARGE = 30 * 2**30  # bytes of GPU memory from which Gemma 3 12B fits, in bfloat16
RATINGS = range(5)


class Rater(Protocol):
    """What a judge asks a model for."""

    name: str

    def placed(self) -> AbstractContextManager[None]:
        """Within it, it is asked."""

    def rating_logits(self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Tensor:
        """Questions, each with its images -> [N, 5] float32: of the answers 0, 1, 2, 3 and 4."""


class VisionLanguageModel:
    """A model and its processor, by a folder or a name on the hub; ask it within `placed`.

    name: None is Gemma 3 12B where there is a GPU with memory for it, else SmolVLM-500M. The weights are
    bfloat16 on a GPU, else float32. Raises UserError for a model that is gated, absent or of another kind.
    """

    def __init__(self, name: str | None = None, *, device: str | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.name = name or default_model(self.device)
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        with explained(self.name, page=self.name):
            self.processor, network, info = _read(self.name, dtype)
        if lacking := sorted(info["missing_keys"]):
            what = f"{len(lacking)} weights of the model are missing, such as {lacking[0]}"
            raise UserError(what, where=self.name, remedy="Download the whole folder.")
        self.network = network.eval().requires_grad_(False)  # on the CPU, see `placed`
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # the answer follows the last token

    @contextmanager
    def placed(self) -> Iterator[None]:
        """With the network on its device; otherwise it is on the CPU, and leaves a training the GPU."""
        self.network.to(self.device)
        try:
            yield
        finally:
            self.network.to("cpu")

    @torch.inference_mode()
    def rating_logits(self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Tensor:
        """[N, 5] float32 on the CPU: the next token's logits after "Rating: (", of the digits 0 to 4."""
        inputs = self._inputs(questions, images, begun="Rating: (")
        takes = inspect.signature(self.network.forward).parameters
        last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        return self.network(**inputs, **last).logits[:, -1, self._digits()].float().cpu()

    @torch.inference_mode()
    def answer(
        self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]], *, max_tokens: int = 96
    ) -> list[str]:
        """The likeliest answer, token by token, of at most `max_tokens`."""
        inputs = self._inputs(questions, images)
        ids = self.network.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _inputs(
        self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]], *, begun: str = ""
    ) -> dict[str, Tensor]:
        """The chat of each question with its images before it, and how the answer begins."""
        texts = []
        for question, shown in zip(questions, images, strict=True):
            content = [{"type": "image"}] * len(shown) + [{"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            texts.append(text + begun)
        begins = bool(self.tokenizer.bos_token) and texts[0].startswith(self.tokenizer.bos_token)
        shown = [[image.convert("RGB") for image in group] for group in images]
        inputs = self.processor(
            text=texts, images=shown, padding=True, return_tensors="pt", add_special_tokens=not begins
        )
        return inputs.to(self.device, dtype=self.network.dtype)

    def _digits(self) -> list[int]:
        """The tokens of 0 to 4. Raises UserError for a tokenizer that has none of their own."""
        last = [self.tokenizer.encode(str(digit), add_special_tokens=False)[-1] for digit in RATINGS]
        if [self.tokenizer.decode([token]).strip() for token in last] != [str(digit) for digit in RATINGS]:
            what, remedy = "The model's tokenizer has no tokens of the digits", f"Take {SMOL}."
            raise UserError(what, where=self.name, remedy=remedy)
        return last


@cache
def shared_model(name: str | None = None, *, device: str | None = None) -> VisionLanguageModel:
    """The model of these arguments, loaded once in a process: a run has several evaluations by one judge."""
    return VisionLanguageModel(name, device=device)


def default_model(device: str) -> str:
    """The larger one where its memory is there."""
    is_large = device.startswith("cuda") and torch.cuda.get_device_properties(device).total_memory >= LARGE
    return GEMMA if is_large else SMOL


def expected_rating(logits: Tensor) -> Tensor:
    """[N, 5] logits of 0 to 4 -> [N] float64 in [0, 4]: the mean of the ratings, weighted by probability.

    It is deterministic, reads no prose, and tells two images apart that get the same likeliest digit.
    """
    return logits.double().softmax(-1) @ torch.arange(5, dtype=torch.float64)


def _read(name: str, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Any]]:
    """(processor, network, what its files lack)."""
    try:
        processor = AutoProcessor.from_pretrained(name)
        network, info = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise  # which the hub's part explains
        what = f"This is no model of images and text: {str(error).splitlines()[0]}"
        raise UserError(
            what, where=name, remedy=f"Take an image-text-to-text model, such as {SMOL}."
        ) from error
    if not hasattr(processor, "tokenizer") or not getattr(processor, "chat_template", None):
        what, remedy = "The model has no chat template", "Take an instruction-tuned model."
        raise UserError(what, where=name, remedy=remedy)
    return processor, network, info
