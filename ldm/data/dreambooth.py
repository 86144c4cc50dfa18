"""DreamBooth's data module: a folder of photos and a set of prior images -> endless batches.

It knows no network: `attach` hands it the encoder and the prior images.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.data.images import load_image
from ldm.data.items import VALIDATION_START, DreamBoothDataset, Index, ItemBatches, Part, Photo, read_photos
from ldm.data.latents import Encode, cached_moments, views_at_once, without_spread
from ldm.data.priors import Draw, PriorSet
from ldm.data.prompts import (
    PRIOR_TEMPLATE,
    SUBJECT_TEMPLATE,
    check_prompts,
    fill,
    read_caption,
    require_identifier,
)
from ldm.errors import UserError

log = logging.getLogger(__name__)

ENOUGH_PHOTOS = 5  # to hold one of them out


class DreamBoothDataModule(pl.LightningDataModule):
    """A folder of a few photos of the subject, and prior images: drawn by the base model or given.

    Call `check`, then `attach`, then train. With a Trainer of several devices, pass it
    `use_distributed_sampler=False`: the batches are already each rank's own.

    Args:
        subject_root: folder of photos of the subject.
        class_word: what the subject is: dog.
        identifier: rare word that will name the subject.
        subject_prompt, prior_prompt: templates with {identifier} and {class_word}; None is
            "a photo of sks dog" and "a photo of a dog".
        size: pixels a side.
        batch_size, prior_batch_size: items per micro-batch and device; None is as many as the subject's.
            Without prior images (num_priors 0 and no prior_root) there are no prior items, unless
            `prior_caption_dropout` asks for some.
        crop: the largest square in the middle, or anywhere: one of `crop_variants` fixed ones per photo.
        flip: mirrors half of the photos; turn it off for a subject with lettering or a parting.
        prior_root: folder of your own photos of the class, all of which are used, none drawn.
        num_priors: prior images that the base model draws. They are used as drawn, never mirrored.
        online_priors: every prior item shows a new image, which the base draws between two steps (Ruiz et al.
            2023, sec. 3.3); the first `num_priors` are kept for validation. All go to the same set.
        captions: a photo's caption is the .txt file beside it, if there is one.
        caption_dropout: share of the items with an empty caption, 0 to 1, the subject's too: that teaches
            the empty prompt the subject.
        prior_caption_dropout: share of the prior items alone with an empty caption, 0 to 1: they hold the
            empty prompt, from which classifier-free guidance extrapolates, where the base has it
            (docs/guidance.md). Without prior images the prior items then show the subject's photos, for which
            the target has to be the teacher's prediction; those with a caption have `prior_prompt`.
        cache_latents: encode each view once before training rather than at every step.
        cache_root: folder that keeps the encoded views for later runs; None keeps them in memory.
        skip_unreadable: leave pictures out that cannot be decoded rather than stop.
        num_workers: processes that decode when latents are not cached; any number gives the same items.
        accumulate: micro-batches per optimizer step, as the Trainer has it.
        validation_batches: batches of the validation loss, each as large as a step's: items that never train,
            the same each time. The Trainer computes it every `val_check_interval` batches, where that is a
            whole number.
        hold_out: of five photos or more, the last by name never trains: the validation loss is that of it.
    """

    def __init__(
        self,
        *,
        subject_root: str,
        class_word: str,
        size: int,
        identifier: str = "sks",
        subject_prompt: str | None = None,
        prior_prompt: str | None = None,
        batch_size: int = 1,
        prior_batch_size: int | None = None,
        seed: int = 23,
        crop: Literal["center", "random"] = "center",
        crop_variants: int = 8,
        flip: bool = True,
        prior_root: str | None = None,
        num_priors: int = 64,
        online_priors: bool = False,
        captions: bool = False,
        caption_dropout: float = 0.0,
        prior_caption_dropout: float = 0.0,
        cache_latents: bool = True,
        cache_root: str | None = None,
        skip_unreadable: bool = False,
        num_workers: int = 0,
        accumulate: int = 1,
        validation_batches: int = 8,
        hold_out: bool = False,
    ):
        super().__init__()
        self.subject_root, self.prior_root, self.num_priors = subject_root, prior_root, num_priors
        self.words = {"identifier": identifier, "class_word": class_word}
        self.subject_prompt = fill(subject_prompt or SUBJECT_TEMPLATE, **self.words)
        self.prior_prompt = fill(prior_prompt or PRIOR_TEMPLATE, **self.words)
        self.prior_caption_dropout = prior_caption_dropout
        has_priors = prior_root is not None or num_priors > 0
        self.priors_show_subject = not has_priors and prior_caption_dropout > 0
        self.batch_size = batch_size
        self.prior_batch_size = batch_size if has_priors or self.priors_show_subject else 0
        if prior_batch_size is not None:
            self.prior_batch_size = prior_batch_size
        self.online_priors = online_priors
        self.size, self.seed, self.accumulate, self.num_workers = size, seed, accumulate, num_workers
        self.crop_variants, self.flip = crop_variants if crop == "random" else None, flip
        self.captions, self.caption_dropout, self.skip_unreadable = captions, caption_dropout, skip_unreadable
        self.cache_latents, self.cache_root = cache_latents, cache_root
        self.validation_batches, self.hold_out = validation_batches, hold_out
        self.start_step = 0  # optimizer steps already done: set it before training to resume
        self.attach()

    def attach(
        self,
        *,
        encode: Encode | None = None,
        vae_hash: str = "",
        priors: PriorSet | None = None,
        draw: Draw | None = None,
    ) -> None:
        """Hands over the VAE (images on the CPU -> moments), the hash that names it, the drawn priors.

        `draw` draws more of them as the base does; `online_priors` need it.
        """
        self.encode, self.vae_hash, self.priors, self.draw = encode, vae_hash, priors, draw
        self.dataset: DreamBoothDataset | None = None

    @property
    def draws_priors(self) -> bool:
        """Whether the base model has to draw `num_priors` prior images of `prior_prompt`."""
        return self.prior_batch_size > 0 and self.prior_root is None and not self.priors_show_subject

    def check(self, *, size_multiple: int = 1) -> None:
        """Finds whatever a user got wrong, before any network is built."""
        self._check_numbers(size_multiple)
        has_priors = self.prior_batch_size > 0
        prior_prompt = self.prior_prompt if has_priors else None
        check_prompts(**self.words, subject_prompt=self.subject_prompt, prior_prompt=prior_prompt)
        if has_priors and self.prior_root is not None:
            if Path(self.prior_root).resolve() == Path(self.subject_root).resolve():
                remedy = "Give another folder of the class, or none to have them drawn."
                raise UserError("Subject and prior are the same folder", where=self.prior_root, remedy=remedy)
            log.info("%s: %d photos of the class", self.prior_root, len(self.prior_photos))
        small = [p.path.name for p in self.subject_photos if min(load_image(p.path).size) < self.size]
        if small:
            log.warning("%s: enlarged to %d pixels: %s", self.subject_root, self.size, ", ".join(small))

    def setup(self, stage: str | None = None) -> None:
        """Reads the photos and encodes their views, once."""
        if self.dataset is not None:
            return
        parts = {False: self._part("subject", self.subject_photos)}
        if self.prior_batch_size:
            parts[True] = self._part("prior", self.prior_photos)
        for photo in parts[False].held_out:
            log.info("%s never trains: the validation loss is that of it", photo.path)
        moments = self._moments(parts) if self.cache_latents else None
        self.dataset = DreamBoothDataset(parts, moments, self._fresh if self.online_priors else None)

    def train_dataloader(self) -> DataLoader:
        """Endless batches of this rank from `start_step` on, for the Trainer."""
        return self.loader(**self._rank(), start_step=self.start_step)

    def val_dataloader(self) -> DataLoader:
        """Items beyond all that train: the same ones however a step is split over ranks and micro-batches."""
        batches = self._batches(**self._rank(), start_step=VALIDATION_START)
        return self._loader(list(islice(batches, self.validation_batches * self.accumulate)))

    def loader(self, *, rank: int = 0, world_size: int = 1, start_step: int = 0) -> DataLoader:
        """Batches: {"moments" [B, 2z, h, w] or "image" [B, 3, H, W], "caption" list[str],
        "is_prior" [B] bool, "item" [B] int64}, subject items first."""
        return self._loader(self._batches(rank=rank, world_size=world_size, start_step=start_step))

    def _rank(self) -> dict[str, int]:
        trainer = self.trainer
        return {"rank": trainer.global_rank, "world_size": trainer.world_size} if trainer else {}

    def _batches(self, *, rank: int = 0, world_size: int = 1, start_step: int = 0) -> ItemBatches:
        return ItemBatches(
            batch_size=self.batch_size,
            prior_batch_size=self.prior_batch_size,
            accumulate=self.accumulate,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
        )

    def _loader(self, batches: Iterable[list[Index]]) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=0 if self.cache_latents else self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else making an iterator draws from the global one
        )

    @cached_property
    def subject_photos(self) -> tuple[Photo, ...]:
        """The photos of the subject, with their captions."""

        def caption(path: Path) -> str:
            own = self._own_caption(path)
            if own is not None:
                require_identifier(own, identifier=self.words["identifier"], where=path.with_suffix(".txt"))
            return own or self.subject_prompt

        return read_photos(self.subject_root, caption=caption, skip_unreadable=self.skip_unreadable)

    @cached_property
    def prior_photos(self) -> tuple[Photo, ...]:
        """Images of the class, the user's own or drawn by the base model, or else the subject's photos."""
        if self.priors_show_subject:
            return tuple(replace(photo, caption=self.prior_prompt) for photo in self.subject_photos)
        if self.prior_root is not None:
            return read_photos(
                self.prior_root,
                caption=lambda path: self._own_caption(path) or self.prior_prompt,
                skip_unreadable=self.skip_unreadable,
            )
        if self.priors is None:
            raise ValueError("prior images have to be drawn and attached before setup")
        spec = self.priors.spec
        if (spec.prompt, spec.size) != (self.prior_prompt, self.size):
            raise ValueError(f"the prior images were drawn for {spec.prompt!r} at {spec.size} pixels")
        images = self.priors.images(self.num_priors)
        if len(images) < self.num_priors:
            what = f"{self.num_priors - len(images)} of {self.num_priors} prior images are missing"
            raise UserError(what, where=self.priors.folder, remedy="Run scripts/generate_priors.py.")
        return tuple(
            Photo(self.priors.picture(i), image.sha256, self.prior_prompt) for i, image in images.items()
        )

    def _own_caption(self, path: Path) -> str | None:
        return read_caption(path, **self.words) if self.captions else None

    def _part(self, name: Literal["subject", "prior"], photos: tuple[Photo, ...]) -> Part:
        drawn = name == "prior" and self.draws_priors
        of_subject = name == "subject" or self.priors_show_subject
        held = photos[-1:] if of_subject and self.hold_out and len(photos) >= ENOUGH_PHOTOS else ()
        return Part(
            name,
            photos[: len(photos) - len(held)],
            size=self.size,
            seed=self.seed,
            crop_variants=None if drawn else self.crop_variants,
            flip=self.flip and not drawn,
            caption_dropout=self.caption_dropout,
            empty_share=self.prior_caption_dropout if name == "prior" else 0.0,
            held_out=held,
        )

    def _moments(self, parts: Mapping[bool, Part]) -> dict[str, Tensor]:
        """Moments of every view, by key. Drawn priors have theirs from the sampler, without spread."""
        moments = {}
        if self.draws_priors:
            for i, view in enumerate(parts[True].views()):
                moments[view.key] = without_spread(self.priors.latents(i))
        views = [view for part in parts.values() for view in part.views()]
        todo = {view.key: view.render for view in views if view.key not in moments}
        folder = Path(self.cache_root) if self.cache_root else None
        with tqdm(total=len(todo), desc="encoding", unit="view", disable=None) as bar:
            encoded = cached_moments(
                todo,
                self.encode,
                vae_hash=self.vae_hash,
                folder=folder,
                batch_size=views_at_once(self.size),
                progress=bar.update,
            )
        return moments | encoded

    def _fresh(self, items: Sequence[int]) -> list[Tensor]:
        """Moments of prior items, from images behind the first `num_priors`: one of its own for each item."""
        drawn = self.priors.drawn_now([self.num_priors + item for item in items], self.draw)
        return [without_spread(latents) for latents in drawn]

    def _check_numbers(self, size_multiple: int) -> None:
        least = {"size": 1, "batch_size": 1, "prior_batch_size": 0, "num_priors": 0}
        for name, bound in (least | {"num_workers": 0, "accumulate": 1, "validation_batches": 0}).items():
            if getattr(self, name) < bound:
                remedy = f"It must be at least {bound}."
                raise UserError(f"{name} is {getattr(self, name)}", where=name, remedy=remedy)
        if self.crop_variants is not None and self.crop_variants < 1:
            raise UserError("There is no crop to choose", where="crop_variants", remedy="Take 1 or more.")
        if self.size % size_multiple:
            near = max(size_multiple, round(self.size / size_multiple) * size_multiple)
            remedy = f"It must be a multiple of {size_multiple}; {near} is near."
            raise UserError(f"size is {self.size} pixels", where="size", remedy=remedy)
        if self.online_priors and not (self.draws_priors and self.cache_latents):
            remedy = "They need num_priors, no prior_root, and cache_latents: true."
            raise UserError("There is nothing to draw online", where="online_priors", remedy=remedy)
        for name in ("caption_dropout", "prior_caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"{getattr(self, name)} is no share", where=name, remedy="Choose from 0 to 1."
                )
        if self.prior_caption_dropout and not self.prior_batch_size:
            remedy = "Raise prior_batch_size, or set prior_caption_dropout to 0."
            raise UserError("There are no prior items to hold", where="prior_caption_dropout", remedy=remedy)
        if self.draws_priors and not self.num_priors:
            remedy = "Raise num_priors, give prior_root, or set prior_batch_size to 0."
            raise UserError("Prior items are wanted without images", where="prior_batch_size", remedy=remedy)
