"""Widths of layers: which numbers have to divide them."""

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
