"""Features of photographs by published networks: embeddings of DINO and CLIP, distances of LPIPS.

The networks are folders in transformers' format, or names on the Hugging Face hub.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model, PreTrainedModel, ViTModel

from ldm.errors import UserError

DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-base-patch32"
DINOV2 = "facebook/dinov2-base"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of R, G, B in [0, 1]
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
Images = Sequence[Image.Image]


class Dino:
    """The [CLS] token of DINO's ViT-S/16 (Caron et al. 2021).

    Images are preprocessed as by DINO's authors: the shorter side to 256 pixels, then a center crop of 224.
    The hub's preprocessor squeezes images to 224 x 224 instead, and does not give the paper's numbers.
    """

    def __init__(self, name: str = DINO, *, device: str | torch.device = "cpu", batch_size: int = 32):
        self.network = _load(partial(ViTModel.from_pretrained, add_pooling_layer=False), name).to(device)
        self.device, self.batch_size = device, batch_size

    @torch.inference_mode()
    def embed_images(self, images: Images) -> Tensor:
        """N images -> [N, D] float32 of unit norm, on the CPU."""
        side = self.network.config.image_size

        def embed(batch: Images) -> Tensor:
            pixels = prepare(batch, resize=side * 256 // 224, crop=side, normal=IMAGENET).to(self.device)
            return self.network(pixels).last_hidden_state[:, 0]

        return _in_batches(embed, images, self.batch_size)


class DinoV2:
    """The [CLS] token of DINOv2's ViT-B/14 (Oquab et al. 2023), after its last norm.

    Its cosines are not comparable with DINO's. Images are preprocessed as by its authors: the shorter side to
    256 pixels, then a center crop of 224.
    """

    SIDE = 224  # of the crop: its positions were learned at 518 pixels, and are interpolated

    def __init__(self, name: str = DINOV2, *, device: str | torch.device = "cpu", batch_size: int = 32):
        self.network = _load(Dinov2Model.from_pretrained, name).to(device)
        self.device, self.batch_size = device, batch_size

    @torch.inference_mode()
    def embed_images(self, images: Images) -> Tensor:
        """N images -> [N, D] float32 of unit norm, on the CPU."""
        side = min(self.SIDE, self.network.config.image_size)

        def embed(batch: Images) -> Tensor:
            pixels = prepare(batch, resize=side * 256 // 224, crop=side, normal=IMAGENET).to(self.device)
            return self.network(pixels).pooler_output

        return _in_batches(embed, images, self.batch_size)


class Clip:
    """Embeddings of images and texts in CLIP's common space (Radford et al. 2021), ViT-B/32 by default."""

    def __init__(self, name: str = CLIP, *, device: str | torch.device = "cpu", batch_size: int = 32):
        self.network = _load(CLIPModel.from_pretrained, name).to(device)
        self.tokenizer = _load_tokenizer(name)
        self.device, self.batch_size = device, batch_size

    @torch.inference_mode()
    def embed_images(self, images: Images) -> Tensor:
        """N images -> [N, D] float32 of unit norm, on the CPU."""
        side = self.network.config.vision_config.image_size

        def embed(batch: Images) -> Tensor:
            pixels = prepare(batch, resize=side, crop=side, normal=OPENAI).to(self.device)
            return self.network.get_image_features(pixels).pooler_output

        return _in_batches(embed, images, self.batch_size)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """M texts -> [M, D] float32 of unit norm, on the CPU; texts that are too long are truncated."""
        length = self.network.config.text_config.max_position_embeddings

        def embed(batch: Sequence[str]) -> Tensor:
            tokens = self.tokenizer(
                list(batch), padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            return self.network.get_text_features(**tokens.to(self.device)).pooler_output

        return _in_batches(embed, texts, self.batch_size)


class Lpips:
    """Perceptual distance by AlexNet's features (Zhang et al. 2018); needs the extra `lpips`."""

    def __init__(self, *, device: str | torch.device = "cpu", batch_size: int = 32):
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.network = LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)
        except ModuleNotFoundError as error:
            remedy = 'Install it with `pip install -e ".[lpips]"`, or set diversity=false.'
            raise UserError(f"LPIPS needs {error.name or 'torchvision'}", remedy=remedy) from error
        except OSError as error:
            remedy = "Download them where there is a network (into TORCH_HOME), or set diversity=false."
            raise UserError(f"AlexNet's weights cannot be loaded: {error}", remedy=remedy) from error
        self.device, self.batch_size = device, batch_size

    @torch.inference_mode()
    def __call__(self, pairs: Sequence[tuple[Image.Image, Image.Image]]) -> Tensor:
        """N pairs, the two of each of one size -> distances [N] float32, on the CPU; 0 for equal ones."""

        def distance(batch: Sequence[tuple[Image.Image, Image.Image]]) -> Tensor:
            one, other = (
                torch.stack([_pixels(image) * 2 - 1 for image in side]) for side in zip(*batch, strict=True)
            )
            return self.network(one.to(self.device), other.to(self.device)).flatten()

        found, sizes = torch.empty(len(pairs)), [one.size for one, _ in pairs]
        for size in dict.fromkeys(sizes):
            own = [k for k, other in enumerate(sizes) if other == size]
            for batch in _batches(own, self.batch_size):
                found[batch] = distance([pairs[k] for k in batch]).float().cpu()
        return found


def prepare(
    images: Images, *, resize: int, crop: int, normal: tuple[Sequence[float], Sequence[float]]
) -> Tensor:
    """Images -> [N, 3, crop, crop]: shorter side to `resize` pixels (bicubic), center crop, normalised."""
    pixels = torch.stack([_pixels(_middle(image.convert("RGB"), resize, crop)) for image in images])
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in normal)
    return (pixels - mean) / deviation


def _middle(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """As torchvision's Resize and CenterCrop, to the pixel: the longer side is rounded down."""
    short = min(image.size)
    width, height = (resize * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return image.crop((left, top, left + crop, top + crop))


def _pixels(image: Image.Image) -> Tensor:
    """-> [3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 255


def _load(read: Callable[..., Any], name: str) -> PreTrainedModel:
    """A network with all of its weights: transformers would initialise missing ones at random."""
    try:
        network, info = read(name, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise _absent(name) from error
    if lacking := sorted(info["missing_keys"]) + sorted(info["mismatched_keys"]):
        what = f"The file is of another model: {len(lacking)} weights are missing, such as {lacking[0]}"
        raise UserError(what, where=name, remedy=f"DINO is {DINO}, DINOv2 {DINOV2}, CLIP {CLIP}.")
    return network.eval().requires_grad_(False)


def _load_tokenizer(name: str) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _absent(name) from error


def _absent(name: str) -> UserError:
    remedy = f"Where there is a network, run `hf download {_released(name)} --local-dir FOLDER`."
    what = "The model is neither a transformers folder nor available from the Hugging Face hub"
    return UserError(what, where=name, remedy=f"{remedy} Then give that folder.")


def _released(name: str) -> str:
    return DINOV2 if "dinov2" in name else DINO if "dino" in name else CLIP


def _in_batches(embed: Callable[[Any], Tensor], items: Sequence, size: int) -> Tensor:
    rows = [F.normalize(embed(batch).float(), dim=1).cpu() for batch in _batches(items, size)]
    return torch.cat(rows)


def _batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[first : first + size] for first in range(0, len(items), size)]
