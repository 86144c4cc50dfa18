"""Direct consistency optimization: the subject is learnt as an advantage over the base, which bounds it."""

import torch.nn.functional as F
from torch import Tensor

from ldm.annotations import PositiveFloat


class DCO:
    """Direct consistency optimization (Lee et al. 2024, arXiv 2402.12004), without prior images.

    The loss of an item is -(2 / beta) log sigmoid(-beta (e - e_base)), where e and e_base are the (weighted)
    mean squared errors of the network and of the untouched base, at the same noise and timestep; the base is
    told the caption with the class word in the identifier's place. An item on which the network is ahead of
    the base by several 1 / beta has hardly any gradient left.

    The paper's loss is without the factor 2 / beta, by which the gradient begins as the mean squared error's:
    so clipping and the weights of the other losses keep their meaning.

    beta: strength of the bound, the paper's beta T for means over latents; the authors train with 1000.
    """

    def __init__(self, *, beta: PositiveFloat = 1000.0):
        self.beta = beta

    def compare(self, losses: Tensor, base_losses: Tensor) -> Tensor:
        """losses, base_losses: [B] -> [B]."""
        return -2 / self.beta * F.logsigmoid(-self.beta * (losses - base_losses))
