"""The objective: what a prediction is compared with, and how errors become one loss."""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ldm.annotations import Builds, Node, NonNegativeFloat, PositiveFloat
from ldm.config import instantiate
from ldm.diffusion.loss import mean_per_item, mean_where, min_snr_weights, squared_error
from ldm.diffusion.process import NoiseProcess

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
        prior_loss_weight: lambda of eq. 2; 0 trains without prior preservation.
        prior_target: of the prior items: "noise", as of the subject's, or "teacher": the base's prediction.
        weighting: node of a `Weighting`: how much the loss at each timestep counts, such as `MinSNR`; None
            leaves all equal.
        l2_sp_weight: weight of the squared distance of the weights to the base's, which can stand in for
            prior images (`num_priors` 0); logged as `train/l2_distance`.
    """

    def __init__(
        self,
        *,
        prior_loss_weight: NonNegativeFloat = 1.0,
        prior_target: PriorTarget = "noise",
        weighting: Annotated[Node, Builds(Weighting)] | None = None,
        l2_sp_weight: NonNegativeFloat = 0.0,
    ):
        self.stream_weights = {"subject": 1.0, "prior": prior_loss_weight}
        self.prior_target = prior_target
        self.weighting: Weighting | None = instantiate(weighting) if weighting else None
        self.l2_sp_weight = l2_sp_weight

    def per_item(self, process: NoiseProcess, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Weighted loss of each item. prediction, target: [B, C, h, w], t: [B] -> [B] float32."""
        error = squared_error(prediction, target)  # weights of pixels belong here
        losses = mean_per_item(error)
        return losses if self.weighting is None else losses * self.weighting(process, t)

    def combine(self, per_item: Tensor, streams: Mapping[str, Tensor]) -> Loss:
        """per_item: [B], already weighted. streams: name -> [B] bool, which items are its own."""
        means = {name: mean_where(per_item, mask) for name, mask in streams.items()}
        return Loss(sum(self.stream_weights[name] * mean for name, mean in means.items()), means)
