"""Memo of generated images: what several evaluations of one model need is generated once."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

from PIL import Image

from ldm.evaluation.protocol import GeneratedImage
from ldm.pipeline import Text2Image

BUDGET = 128 * 2**20  # bytes of pixels that one model's images may take


class ImageMemo:
    """Images of one model by prompt, seed and settings; beyond the budget the oldest are dropped."""

    def __init__(self, budget: int = BUDGET):
        self.images: OrderedDict[Hashable, Image.Image] = OrderedDict()
        self.budget = budget
        self.bytes = 0

    def keep(self, key: Hashable, image: Image.Image) -> None:
        if key in self.images:
            return
        self.images[key] = image
        self.bytes += _size(image)
        while self.bytes > self.budget and len(self.images) > 1:
            _, oldest = self.images.popitem(last=False)
            self.bytes -= _size(oldest)


class MemoPipeline:
    """A pipeline that generates only images that are not in the memo, by the defaults of `Text2Image`."""

    def __init__(self, pipeline: Text2Image, memo: ImageMemo):
        self.pipeline = pipeline
        self.memo = memo

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance_scale: float = 7.5,
        batch_size: int = 8,
        progress: bool = False,
        **how: Any,
    ) -> list[GeneratedImage]:
        how["guidance_scale"] = guidance_scale
        guided = guidance_scale != 1 and self.pipeline.guidance_base is not None
        settings = repr((guided, self.pipeline.default_size, *sorted(how.items())))
        keys = [(prompt, seed, settings) for prompt, seed in zip(prompts, seeds, strict=True)]
        found = {key: self.memo.images[key] for key in keys if key in self.memo.images}
        new = list(dict.fromkeys(key for key in keys if key not in found))
        if new:
            generated = self.pipeline(
                [prompt for prompt, _, _ in new],
                seeds=[seed for _, seed, _ in new],
                batch_size=batch_size,
                progress=progress,
                **how,
            )
            found |= {key: sample.image for key, sample in zip(new, generated, strict=True)}
        for key in new:
            self.memo.keep(key, found[key])
        return [GeneratedImage(found[key], key[0]) for key in keys]


def _size(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())
