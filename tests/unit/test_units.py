"""Does `parse_quantity` read every quantity as pint does, and refuse everything it should?

pint is the other program; simmem does without it at run time because importing it is slow.
"""

from __future__ import annotations

import math

import pint
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmem.errors import UnitError
from simmem.units import DIMENSIONS, format_quantity, parse_quantity

REGISTRY = pint.UnitRegistry()
REGISTRY.define("FLOP = [operation]")
REGISTRY.define("token = [token]")

DECIMAL = ["", "k", "M", "G", "T", "P"]
BINARY = ["Ki", "Mi", "Gi", "Ti"]
SMALL = ["", "m", "u", "µ", "μ", "n", "p"]

# dimension -> (unit, prefixes, pint's base unit, believable interval in it)
CASES = {
    "bytes": ("B", [*DECIMAL, *BINARY], "byte", 1.0, 1e16),
    "bytes_per_s": ("B/s", [*DECIMAL, *BINARY], "byte/second", 1e3, 1e14),
    "flop_per_s": ("FLOP/s", DECIMAL, "FLOP/second", 1e6, 1e17),
    "s": ("s", SMALL, "second", 1e-12, 1e3),
    "joule_per_byte": ("J/B", SMALL, "joule/byte", 1e-15, 1e-5),
    "joule_per_flop": ("J/FLOP", SMALL, "joule/FLOP", 1e-16, 1e-6),
    "watt": ("W", ["m", "u", "µ", *DECIMAL], "watt", 1e-6, 1e6),
    "joule": ("J", [*SMALL, *DECIMAL], "joule", 1e-12, 1e9),
    "tokens_per_s": ("token/s", ["", "k", "M"], "token/second", 1e-6, 1e9),
}


@st.composite
def quantities(draw: st.DrawFn) -> tuple[str, str, float]:
    """(dimension, text, pint's value in the base unit), inside what can be believed."""
    dimension = draw(st.sampled_from(sorted(CASES)))
    unit, prefixes, base, low, high = CASES[dimension]
    prefix = draw(st.sampled_from(prefixes))
    target = 10 ** draw(st.floats(math.log10(low) + 0.1, math.log10(high) - 0.1))
    scale = REGISTRY.Quantity(1.0, prefix + unit).to(base).magnitude
    number = draw(st.sampled_from(["{!r}", "{:.6e}", "{:.3E}", "+{!r}"])).format(target / scale)
    space = draw(st.sampled_from(["", " ", "  "]))
    value = REGISTRY.Quantity(float(number), prefix + unit).to(base).magnitude
    return dimension, f"{number}{space}{prefix}{unit}", value


@given(quantities())
def test_reads_as_pint_does(case: tuple[str, str, float]) -> None:
    dimension, text, expected = case
    assert parse_quantity(text, dimension) == pytest.approx(expected, rel=1e-12)


@given(quantities(), st.sampled_from(sorted(CASES)))
def test_another_dimension_is_refused(case: tuple[str, str, float], other: str) -> None:
    dimension, text, _ = case
    if other != dimension:
        with pytest.raises(UnitError):
            parse_quantity(text, other)


@given(quantities())
def test_a_number_alone_is_refused(case: tuple[str, str, float]) -> None:
    dimension, text, value = case
    with pytest.raises(UnitError):
        parse_quantity(value, dimension)
    number = text.rstrip("".join(set("BFLOPJWskMGTPKimuµμnptoken/ ")))
    with pytest.raises(UnitError, match="no unit"):
        parse_quantity(number, dimension)


@given(quantities())
def test_negative_is_refused(case: tuple[str, str, float]) -> None:
    dimension, text, _ = case
    with pytest.raises(UnitError):
        parse_quantity("-" + text.lstrip("+"), dimension)


def test_every_dimension_is_held_to_pint() -> None:
    assert set(DIMENSIONS) == set(CASES) | {"ratio", "share", "count"}


def test_gb_is_not_gib() -> None:
    assert parse_quantity("6 GB", "bytes") == 6_000_000_000
    assert parse_quantity("6 GiB", "bytes") == 6_442_450_944
    assert parse_quantity("6 GiB", "bytes") == REGISTRY("6 GiB").to("byte").magnitude
    assert parse_quantity("6 GB", "bytes") == REGISTRY("6 GB").to("byte").magnitude


@pytest.mark.parametrize(("value", "dimension", "digits", "text"), [
    (999.99e6, "bytes", 3, "1 GB"), (999.4e6, "bytes", 3, "999 MB"), (999.5e9, "bytes_per_s", 3, "1 TB/s"),
    (999.94e6, "bytes", 4, "999.9 MB"), (99.7e6, "bytes", 2, "100 MB"), (9.996, "bytes", 3, "10 B"),
    (999.6e-6, "s", 3, "1 ms"), (999.6, "s", 3, "1000 s"), (12345.6, "s", 3, "12346 s"),
    (-999.99e6, "bytes", 3, "-1 GB"),
])
def test_a_number_is_rounded_before_its_prefix_is_chosen(value: float, dimension: str, digits: int, text: str) -> None:
    assert format_quantity(value, dimension, digits) == text


@given(st.floats(1.0, 9.99e17), st.integers(2, 6))
def test_no_size_is_printed_with_an_exponent_or_four_digits_too_many(value: float, digits: int) -> None:
    number, unit = format_quantity(value, "bytes", digits).split()
    assert "e" not in number
    assert float(number) < 1000
    assert float(number) * {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}[unit] == pytest.approx(
        value, rel=0.5 * 10.0 ** (1 - digits))


@pytest.mark.parametrize(("text", "dimension", "hint"), [
    ("6 Gb", "bytes", "bits"),
    ("6 Gbit", "bytes", "bits"),
    ("40 Gb/s", "bytes_per_s", "bits"),
    ("6 KB", "bytes", "KiB"),
    ("6 gb", "bytes", "6 GB"),
    ("6 GB/s", "bytes", "6 GB"),
    ("6", "bytes", "no unit"),
    ("", "bytes", "6 GB"),
    ("GB", "bytes", "6 GB"),
    ("6 GB extra", "bytes", "6 GB"),
    ("1,5 GB", "bytes", "6 GB"),
    ("0x10 GB", "bytes", "6 GB"),
    ("nan GB", "bytes", "6 GB"),
    ("inf GB", "bytes", "6 GB"),
    ("1e400 GB", "bytes", "believed"),
    ("1e30 GB", "bytes", "believed"),
    ("0 GB", "bytes", "believed"),
    ("0 GB/s", "bytes_per_s", "believed"),
    ("5 PB/s", "bytes_per_s", "believed"),
    ("1 TFLOPS", "flop_per_s", "TFLOP/s"),
    ("3 h", "s", "us"),
    ("2 Ms", "s", "us"),
    ("0.85 %", "ratio", "0.85"),
    ("85%", "ratio", "0.85"),
    ("-0.5", "ratio", "believed"),
    ("2 percent", "share", "2 %"),
    ("5", "tokens_per_s", "no unit"),
    ("5 J/B", "joule", "2.5 J"),
])
def test_refused_with_a_hint(text: str, dimension: str, hint: str) -> None:
    with pytest.raises(UnitError) as caught:
        parse_quantity(text, dimension, file="d.toml", key="link.flash.rate")
    assert hint in caught.value.message
    assert str(caught.value).startswith("d.toml: link.flash.rate: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [6, 6.0, True, None, [6], {"value": 6}, b"6 GB"])
def test_a_quantity_is_quoted_text(value: object) -> None:
    with pytest.raises(UnitError, match="6 GB"):
        parse_quantity(value, "bytes")


@pytest.mark.parametrize(("value", "dimension"), [(0.85, "ratio"), ("0.5", "ratio"), (1, "ratio"), (32, "count")])
def test_ratios_and_counts_are_bare(value: object, dimension: str) -> None:
    assert parse_quantity(value, dimension) == float(str(value))


def test_a_share_may_be_written_in_per_cent() -> None:
    assert parse_quantity("2 %", "share") == parse_quantity(0.02, "share") == 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True])
def test_a_bare_number_is_finite(value: object) -> None:
    with pytest.raises(UnitError):
        parse_quantity(value, "ratio")


@given(st.text(max_size=30), st.sampled_from(DIMENSIONS))
def test_any_text_gives_a_number_or_one_clear_error(text: str, dimension: str) -> None:
    try:
        value = parse_quantity(text, dimension)
    except UnitError:
        return
    assert math.isfinite(value)
    assert value >= 0
