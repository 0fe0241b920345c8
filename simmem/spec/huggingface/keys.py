"""What does a Hugging Face configuration file say under a key, and is it what that key has to hold?

The file is a stranger's: its size is bounded, its JSON strict (no NaN, no key twice, no nesting without
end), and every value is checked when it is read, so that each problem is one line with file and key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simmem.errors import SpecError
from simmem.spec.jsonfile import shown

__all__ = ["MAX_CONFIG_BYTES", "Keys"]

MAX_CONFIG_BYTES = 16 << 20
MAX_LAYERS = 1000
MAX_WIDTH = 1_000_000
MAX_COUNT = 1_000_000_000


class Keys:
    """Checked reading of one configuration: its own values, else the defaults of its family's class.

    A key is asked for by the name that most families use; `spellings` has the family's own words for it,
    which go first. Two spellings that contradict each other are an error, not a choice.
    """

    def __init__(self, values: Mapping[str, Any], file: Path, *, defaults: Mapping[str, Any] | None = None,
                 spellings: Mapping[str, tuple[str, ...]] | None = None, inside: str = "") -> None:
        self._values = values
        self._file = str(file)
        self._defaults = defaults or {}
        self._spellings = spellings or {}
        self._inside = inside

    def error(self, key: str, message: str) -> SpecError:
        return SpecError(message, file=self._file, key=self._inside + key)

    def _find(self, key: str) -> tuple[str, Any]:
        """(the spelling found, its value): the file's, else the default; SpecError where there is neither."""
        spelled = [name for name in (*self._spellings.get(key, ()), key) if name in self._values]
        if not spelled:
            if key not in self._defaults:
                raise self.error(key, "is missing, and its family has no default for it")
            return key, self._defaults[key]
        first = spelled[0]
        for other in spelled[1:]:
            if self._values[other] != self._values[first]:
                raise self.error(other, f"found {shown(self._values[other])}, but {first} says "
                                        f"{shown(self._values[first])}: both mean the same")
        return first, self._values[first]

    def says(self, key: str) -> bool:
        """Is the key in the file, and not null?"""
        return any(self._values.get(name) is not None for name in (*self._spellings.get(key, ()), key))

    def integer(self, key: str, *, least: int = 1, most: int = MAX_WIDTH) -> int:
        name, value = self._find(key)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, f"found {shown(value)}, expected a whole number from {least} to {most}")
        return value

    def integer_or_none(self, key: str, *, least: int = 1, most: int = MAX_WIDTH) -> int | None:
        """None where the file says null, or nothing and the class has no default."""
        return None if self._find(key)[1] is None else self.integer(key, least=least, most=most)

    def integer_or_word(self, key: str, word: str) -> int | None:
        """None where the file, or the default, says `word`."""
        return None if self._find(key)[1] == word else self.integer(key)

    def flag(self, key: str) -> bool:
        name, value = self._find(key)
        if not isinstance(value, bool):
            raise self.error(name, f"found {shown(value)}, expected true or false")
        return value

    def word(self, key: str) -> str:
        """A short name made of letters, digits, dots, dashes and underscores."""
        name, value = self._find(key)
        if not isinstance(value, str) or not re.fullmatch(r"[\w.-]{1,40}", value, re.ASCII):
            raise self.error(name, f"found {shown(value)}, expected one short name")
        return value

    def words(self, key: str) -> list[str] | None:
        """A list of texts; None where there is none."""
        name, value = self._find(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, f"found {shown(value)}, expected a list of nothing but names")
        return value

    def integers(self, key: str) -> list[int] | None:
        """A list of whole numbers from 0; None where there is none."""
        name, value = self._find(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= MAX_COUNT for item in value):
            raise self.error(name, f"found {shown(value)}, expected a list of nothing but whole numbers from 0")
        return value

    def expect(self, key: str, *allowed: object) -> None:
        """Refuse what changes shapes in a way that is not described: the key is absent or says one of `allowed`."""
        if key in self._values and not any(self.is_value(key, one) for one in allowed):
            raise self.error(key, f"found {shown(self._values[key])}, expected {' or '.join(map(shown, allowed))}: "
                                  "nothing else can be described")

    def is_value(self, key: str, value: object) -> bool:
        """Does the file say just this?"""
        found = self._values.get(key)
        return found == value and type(found) is type(value)

    def nested(self, key: str, *, defaults: Mapping[str, Any] | None = None) -> Keys:
        """The object under a key; empty where there is none."""
        value = self._values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, f"found {shown(value)}, expected an object")
        return Keys(value, Path(self._file), defaults=defaults, inside=f"{self._inside}{key}.")

    def with_value(self, key: str, other: Keys) -> Keys:
        """The same values and, under `key`, those of another object, which must not contradict them."""
        value = other._values[key]
        if key in self._values and self._values[key] != value:
            raise self.error(key, f"found {shown(self._values[key])}, but outside it is {shown(value)}")
        return Keys({**self._values, key: value}, Path(self._file), inside=self._inside)

    def of_family(self, defaults: Mapping[str, Any], spellings: Mapping[str, tuple[str, ...]]) -> Keys:
        """The same values, read with a family's defaults and spellings."""
        return Keys(self._values, Path(self._file), defaults=defaults, spellings=spellings, inside=self._inside)
