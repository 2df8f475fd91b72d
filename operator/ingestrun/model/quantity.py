"""Kubernetes quantities ("512Mi", "1.5G", "1e9") as exact numbers, and bytes as a quantity that people can read.

Source of the syntax: k8s.io/apimachinery/pkg/api/resource. A suffix is of one of three kinds, never mixed: binary (Ki),
decimal (k), or a power of ten (e3); "E" alone is exa, "E3" a power of ten.
"""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal
from typing import Final

_FORM: Final = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))(?:(?P<suffix>[KMGTPE]i|[numkMGTPE])|[eE](?P<power>[+-]?[0-9]{1,3}))?"
)
_FACTORS: Final[dict[str, Decimal]] = {
    **{suffix: Decimal(1024) ** (n + 1) for n, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))},
    **{suffix: Decimal(1000) ** (n - 3) for n, suffix in enumerate(("n", "u", "m", "", "k", "M", "G", "T", "P", "E"))},
}
_SHOWN: Final = ("Ei", "Pi", "Ti", "Gi", "Mi", "Ki")


class QuantityError(ValueError):
    """The text is no quantity."""


def parse_quantity(text: str | int) -> Decimal:
    """Return the number that a quantity stands for.

    Raises:
        QuantityError: the text is no quantity.
    """
    found = _FORM.fullmatch(str(text))
    if found is None:
        raise QuantityError(f"{str(text)[:40]!r} is no quantity such as 512Mi or 2G")
    power = Decimal(10) ** int(found["power"]) if found["power"] else Decimal(1)
    return Decimal(found["number"]) * _FACTORS[found["suffix"] or ""] * power


def read_bytes(text: str | int) -> int:
    """Return a quantity as whole bytes, rounded up as Kubernetes does it.

    Raises:
        QuantityError: the text is no quantity.
    """
    return int(parse_quantity(text).to_integral_value(rounding=ROUND_CEILING))


def render_bytes(number: int) -> str:
    """Write bytes as a quantity in the largest binary unit that divides them."""
    for suffix in _SHOWN:
        whole, rest = divmod(number, int(_FACTORS[suffix]))
        if whole and not rest:
            return f"{whole}{suffix}"
    return str(number)
