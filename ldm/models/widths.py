"""Widths and depths of layers: which numbers have to divide them, and how many there have to be."""

from collections.abc import Sequence

from ldm.errors import UserError


def check_widths(network: str, widths: Sequence[int], **divisors: int) -> None:
    """Raises UserError for a parameter of a network that does not divide the width of a layer."""
    if not widths:
        raise UserError("A network needs one level or more", where=network, remedy="Name its multipliers.")
    for name, divisor in divisors.items():
        for width in widths:
            if divisor < 1 or width % divisor:
                what = f"{name} {divisor} does not divide the {width} channels of a layer"
                raise UserError(what, where=f"{network}.params.{name}", remedy="Choose a divisor.")


def depth_of_levels(depth: int | Sequence[int], *, levels: int) -> list[int]:
    """Transformer blocks of each level: one number for all, or a list, whose length must be right."""
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    if len(depths) != levels:
        what, where = f"{len(depths)} depths of transformers are not those of {levels} levels", "unet.params"
        raise UserError(what, where=f"{where}.transformer_depth", remedy="Give one number, or one a level.")
    return depths
