"""How is a quantity written in a file or on the command line read into SI?

Inside simmem every number is a float64 in SI base units and its name ends in the unit. This
module is the only place where text with prefixes becomes such a number. Decimal and binary
prefixes are exact (1 GB = 1e9 B, 1 GiB = 2**30 B), bits are refused, a bare number is an error.

pint would do this too, but importing it takes longer than half of a whole `simmem plan`; the
tests hold this parser to pint's answers instead.
"""

from __future__ import annotations

import math
import re

from simmem.errors import UnitError

__all__ = ["DIMENSIONS", "format_quantity", "parse_quantity"]

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "μ": 1e-6, "n": 1e-9, "p": 1e-12}

# dimension -> (unit symbol, prefixes allowed, example, smallest and largest believable value)
_TABLE: dict[str, tuple[str, dict[str, float], str, float, float]] = {
    "bytes": ("B", {**_DECIMAL, **_BINARY}, "6 GB", 1.0, 1e16),
    "bytes_per_s": ("B/s", {**_DECIMAL, **_BINARY}, "1.5 GB/s", 1e3, 1e14),
    "flop_per_s": ("FLOP/s", _DECIMAL, "10.6 TFLOP/s", 1e6, 1e17),
    "s": ("s", _SMALL, "113 us", 1e-12, 1e3),
    "joule_per_byte": ("J/B", _SMALL, "58 pJ/B", 1e-15, 1e-5),
    "joule_per_flop": ("J/FLOP", _SMALL, "0.9 pJ/FLOP", 1e-16, 1e-6),
    "watt": ("W", {**_SMALL, **_DECIMAL}, "5 W", 1e-6, 1e6),
    "joule": ("J", {**_SMALL, **_DECIMAL}, "2.5 J", 1e-12, 1e9),
    "tokens_per_s": ("token/s", {"": 1.0, "k": 1e3, "M": 1e6}, "5 token/s", 1e-6, 1e9),
    "share": ("", {"": 1.0, "%": 0.01}, "2 %", 0.0, 1e3),
    "ratio": ("", {"": 1.0}, "0.85", 0.0, 1e3),
    "count": ("", {"": 1.0}, "32", 0.0, 1e9),
}
DIMENSIONS = tuple(_TABLE)

_QUANTITY = re.compile(r"^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S*)\s*$")


def parse_quantity(text: object, dimension: str, *, file: str | None = None, key: str | None = None) -> float:
    """Read `text` as a quantity of `dimension` and return it in SI base units.

    Parameters
    ----------
    text : a quoted quantity such as "6.1 GB/s"; a bare number only for ratios, shares and counts.
    dimension : one of `DIMENSIONS`.
    file, key : where it stands, for the error.

    Raises
    ------
    UnitError
        Without a unit, with a unit of another dimension, not finite, negative or unbelievable.
    """
    unit, prefixes, example, smallest, largest = _TABLE[dimension]
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise UnitError(f"found {text!r}, expected a quantity such as {example!r}", file=file, key=key)
    if isinstance(text, (int, float)):
        if unit:
            raise UnitError(f"found the bare number {text!r}, expected a quoted quantity with a unit such as "
                            f"{example!r}", file=file, key=key)
        text = repr(text)
    match = _QUANTITY.match(text)
    if match is None:
        raise UnitError(f"found {text!r}, expected a quantity such as {example!r}", file=file, key=key)
    number, suffix = match.groups()
    scale = _scale(suffix, unit, prefixes)
    if scale is None:
        found = f"the unit {suffix!r}" if suffix else "no unit"
        hint = ""
        if unit.startswith("B") and suffix[:1] == "K" and not suffix.startswith("Ki"):
            hint = " (write kB for 1000 B or KiB for 1024 B)"
        elif unit.startswith("B") and "b" in suffix:
            hint = " (b is bits; simmem counts bytes, B)"
        raise UnitError(f"found {text!r} with {found}, expected a quantity such as {example!r}{hint}",
                        file=file, key=key)
    value = float(number) * scale
    if not math.isfinite(value) or not (smallest <= value <= largest):
        raise UnitError(f"found {text!r}, which is outside what can be believed for it "
                        f"({smallest:g} to {largest:g} {unit})".replace(" )", ")"), file=file, key=key)
    return value


def _scale(suffix: str, unit: str, prefixes: dict[str, float]) -> float | None:
    if not suffix.endswith(unit):
        return None
    return prefixes.get(suffix[: len(suffix) - len(unit)] if unit else suffix)


def format_quantity(value: float, dimension: str, digits: int = 3) -> str:
    """A value in SI base units as a person reads it: `digits` significant ones, a decimal prefix.

    It is rounded before the prefix is chosen: 999.99 MB is 1 GB.
    "s" takes m, µ and n; bytes and rates take k, M, G, T; ratios and shares become per cent.
    """
    if not math.isfinite(value):
        return "unlimited" if value > 0 else "unknown"
    if dimension in ("ratio", "share"):
        return f"{100 * value:.{max(digits - 2, 0)}f} %"
    unit = _TABLE[dimension][0]
    if value == 0:
        return f"0 {unit}"
    small = dimension == "s" or dimension.startswith("joule")
    ladder = {"": 1.0, "m": 1e-3, "µ": 1e-6, "n": 1e-9, "p": 1e-12} if small else _DECIMAL
    rounded = abs(float(f"{value:.{digits}g}"))
    fitting = [k for k, v in ladder.items() if rounded >= v]
    prefix = max(fitting, key=ladder.__getitem__) if fitting else min(ladder, key=ladder.__getitem__)
    scale = ladder[prefix]
    number = value / scale
    text = f"{number:.{digits}g}" if rounded < scale * 10**digits else f"{number:.0f}"
    return f"{text} {prefix}{unit}"
