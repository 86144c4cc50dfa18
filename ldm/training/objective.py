"""The objective: what a prediction is compared with, and how errors become one loss."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ldm.annotations import Builds, Node, NonNegativeFloat, PositiveFloat
from ldm.config import bound
from ldm.diffusion.loss import mean_per_item, mean_where, min_snr_weights, squared_error
from ldm.diffusion.process import NoiseProcess
from ldm.engine.device import can_pin
from ldm.errors import UserError
from ldm.training.masks import Masks, mix_targets

PriorTarget = Literal["noise", "teacher"]


@runtime_checkable
class Weighting(Protocol):
    """Weights of the items' losses by their timesteps."""

    def __call__(self, process: NoiseProcess, t: Tensor) -> Tensor:
        """t: [B] -> [B] float32, for a squared error in what the network predicts."""


class MinSNR:
    """Min-SNR-gamma weighting (Hang et al. 2023, sec. 3.4).

    gamma: bound of the weight in terms of x0.
    floor: added to that weight, so that the noisiest timesteps have some (see `min_snr_weights`).
    """

    def __init__(self, *, gamma: PositiveFloat = 5.0, floor: NonNegativeFloat = 0.0):
        self.gamma = gamma
        self.floor = floor

    def __call__(self, process: NoiseProcess, t: Tensor) -> Tensor:
        return min_snr_weights(process, t, gamma=self.gamma, floor=self.floor)


@runtime_checkable
class AgainstBase(Protocol):
    """A loss that compares the network's error with the base's, such as `DCO`."""

    def compare(self, losses: Tensor, base_losses: Tensor) -> Tensor:
        """losses, base_losses: [B], weighted errors of the network and of the base -> [B]."""


class StreamLoss(NamedTuple):
    """How the items of a stream count: the weight of their mean loss, and what they learn."""

    weight: float
    target: PriorTarget


class BasePrediction(NamedTuple):
    """What the base predicts for some items of a batch: rows [R] int64, values [R, C, h, w].

    compared: [B] bool, for which items it is no target; None: for none. noise_share: [R, 1, h, w], how much
    of the target is the noise's (`mix_targets`); None: nothing.
    """

    rows: Tensor
    values: Tensor
    compared: Tensor | None = None
    noise_share: Tensor | None = None


class Loss(NamedTuple):
    """total: scalar, the sum of the streams' means by their weights. streams: name -> mean of its items."""

    total: Tensor
    streams: Mapping[str, Tensor]

    def logs(self, stage: str) -> dict[str, Tensor]:
        """Names of curves -> scalars. stage: "train" or "val"."""
        return {f"{stage}/loss": self.total} | {f"{stage}/{k}_loss": mean for k, mean in self.streams.items()}


class Objective:
    """DreamBooth's loss (Ruiz et al. 2023, eq. 2): the mean of each stream's items, weighted, summed.

    Args:
        prior_loss_weight: lambda of eq. 2; for no prior items set the data's `num_priors` and
            `prior_caption_dropout` to 0.
        prior_target: of the prior items: "noise", as of the subject's, or "teacher": the base's prediction.
        weighting: node of a `Weighting`: how much the loss at each timestep counts, such as `MinSNR`; None
            leaves all equal.
        subject_loss: node of what is made of the subject's errors and the base's, such as `DCO`; None: the
            mean squared error.
        l2_sp_weight: weight of the squared distance of the weights to the base's, of a LoRA the squared norm
            of its product, which can stand in for prior images (`num_priors` 0); logged as
            `train/l2_distance`.
        masks: how the subject's photos are masked, as {outside: 0.1}; None: all of each photo is learnt.
    """

    def __init__(
        self,
        *,
        prior_loss_weight: NonNegativeFloat = 1.0,
        prior_target: PriorTarget = "noise",
        weighting: Annotated[Node, Builds(Weighting)] | None = None,
        subject_loss: Annotated[Node, Builds(AgainstBase)] | None = None,
        l2_sp_weight: NonNegativeFloat = 0.0,
        masks: Masks | None = None,
    ):
        self.streams = {
            "subject": StreamLoss(1.0, "noise"),
            "prior": StreamLoss(prior_loss_weight, prior_target),
        }
        self.weighting: Weighting | None = bound(weighting) if weighting else None
        self.subject_loss: AgainstBase | None = bound(subject_loss) if subject_loss else None
        self.l2_sp_weight = l2_sp_weight
        self.masks = masks
        if self.subject_loss is not None and masks is not None and masks.outside_target == "teacher":
            what = "A loss against the base has no part whose target is the base's prediction"
            remedy = "Set objective.masks.outside_target=noise, or take objective.subject_loss off."
            raise UserError(what, where="objective.masks.outside_target", remedy=remedy)

    @property
    def needs_reference(self) -> bool:
        """Whether a stream or a part of its images learns what the base predicts, or is compared with it."""
        return any(map(self._uses_base, self.streams))

    def _uses_base(self, stream: str) -> bool:
        outside = self.masks is not None and self.masks.outside_target == "teacher"
        of_subject = stream == "subject" and (self.subject_loss is not None or outside)
        return of_subject or self.streams[stream].target == "teacher"

    def select(self, batch: dict) -> dict[str, Any]:
        """Additions to a batch, made on the CPU: which items are whose, by "stream", the name of each.

        "stream_masks": name -> [B] bool. "reference_rows" [R] int64 and "reference_items", a list of the same
        numbers: the items that the base predicts. "compared" [B] bool, if there is a `subject_loss`: for
        which of them that is no target. With masks also what `Masks.select` adds. Raises KeyError for an
        unknown stream.
        """
        pinned, names = can_pin(), batch["stream"]
        rows = [k for k, name in enumerate(names) if self._uses_base(name)]
        masks = {
            stream: torch.tensor([name == stream for name in names], pin_memory=pinned)
            for stream in self.streams
        }
        reference_rows = torch.tensor(rows, dtype=torch.int64, pin_memory=pinned)
        found = {"stream_masks": masks, "reference_rows": reference_rows, "reference_items": rows}
        found |= {} if self.subject_loss is None else {"compared": masks["subject"]}
        return found | (self.masks.select(batch.get("mask"), masks["subject"]) if self.masks else {})

    def losses(
        self,
        process: NoiseProcess,
        prediction: Tensor,
        target: Tensor,
        t: Tensor,
        base: BasePrediction | None,
        pixel_weights: Tensor | None = None,
    ) -> Tensor:
        """Loss of each item. prediction, target: [B, C, h, w], t: [B] -> [B] float32.

        base: its prediction for the items that learn it or are compared with it, if there are any.
        pixel_weights: [B, 1, h, w].
        """
        per_item = partial(self.per_item, process, t=t, pixel_weights=pixel_weights)
        if base is None:
            return per_item(prediction, target)
        values = base.values.to(target)
        if base.noise_share is not None:
            values = mix_targets(target[base.rows], values, base.noise_share)
        with_base = target.index_copy(0, base.rows, values)
        if self.subject_loss is None:
            return per_item(prediction, with_base)
        base_losses = per_item(with_base, target)
        target = target.where(base.compared[:, None, None, None], with_base)
        losses = per_item(prediction, target)
        return self.subject_loss.compare(losses, base_losses).where(base.compared, losses)

    def per_item(
        self,
        process: NoiseProcess,
        prediction: Tensor,
        target: Tensor,
        t: Tensor,
        pixel_weights: Tensor | None = None,
    ) -> Tensor:
        """Weighted squared error of each item -> [B] float32.

        prediction, target: [B, C, h, w], t: [B], pixel_weights: [B, 1, h, w].
        """
        error = squared_error(prediction, target)
        losses = mean_per_item(error if pixel_weights is None else error * pixel_weights)
        return losses if self.weighting is None else losses * self.weighting(process, t)

    def combine(self, per_item: Tensor, masks: Mapping[str, Tensor]) -> Loss:
        """per_item: [B], already weighted. masks: name of a stream -> [B] bool, which items are its own."""
        means = {
            name: mean_where(per_item, mask.to(per_item.device, non_blocking=True))
            for name, mask in masks.items()
        }
        return Loss(sum(self.streams[name].weight * mean for name, mean in means.items()), means)
