"""Which prose feeds a capture, and which part of it serves what?

The text is cut into thirds of its tokens: thresholds are fitted on the first, the trace is captured
on the second, perplexity is measured on the third. So no figure is judged on text it was fitted to.
"""

from __future__ import annotations

import codecs
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmem.errors import MachineError, SpecError
from simmem.runtime.models import LoadedModel
from simmem.spec import library

__all__ = ["MAX_TEXT_BYTES", "SourceText", "TokenParts", "default_text_path", "read_text", "split_tokens", "tokenize"]

MAX_TEXT_BYTES = 4 << 20
"""A longer text is cut here: captures use a few thousand tokens of each third. [B]"""

_SHIPPED = {
    "19e6d10cdd36f1955d5c0ea959650f3663d9ab35adab7f221f1cbe34f5ce5f59":
        ("Jane Austen, Persuasion (1818), volume one", "public domain"),
    "c8ffc5632acbc120256ce94032a698d55ce23e06b2af57b450e1663e354b91e6":
        ("Python 3.11 reference, six topics", "PSF-2.0"),
    "15afef278c24ae891bddff15d483f18c0637d6e50e977ee12e8578fa2e80dd25":
        ("King James Bible, Acts of the Apostles", "public domain (in the United Kingdom, Crown patent)"),
}
"""SHA-256 of a text that simmem ships -> what it is and under which licence (workloads/text/README.md)."""


@dataclass(frozen=True)
class SourceText:
    """A text, what to call it and under which licence it is known to stand."""

    content: str
    title: str
    licence: str | None


@dataclass(frozen=True)
class TokenParts:
    """Three disjoint parts of a text's tokens, int64, and where the captured one starts."""

    calibration: NDArray[np.int64]
    capture: NDArray[np.int64]
    evaluation: NDArray[np.int64]
    capture_start: int


def default_text_path() -> Path:
    """The public-domain prose that simmem ships (see README.md beside it)."""
    return library.data_folder() / "workloads" / "text" / "austen-persuasion.txt"


def read_text(path: Path) -> SourceText:
    """Read UTF-8 prose, at most its first `MAX_TEXT_BYTES`.

    Raises
    ------
    SpecError
        Not a file, empty, or not UTF-8.
    MachineError
        The file exists and cannot be read.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_TEXT_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise SpecError("is not a text file that exists", file=str(path)) from None
    except OSError as error:
        raise MachineError(f"cannot be read: {error.strerror or error}", file=str(path)) from None
    whole = len(data) <= MAX_TEXT_BYTES
    try:  # an incremental decoder drops a character that the cut splits, and nothing else
        content = codecs.getincrementaldecoder("utf-8")().decode(data[:MAX_TEXT_BYTES], final=whole)
    except UnicodeDecodeError as error:
        raise SpecError(f"is not UTF-8 text (byte {error.start})", file=str(path)) from None
    if not content.strip():
        raise SpecError("holds no text", file=str(path))
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 in _SHIPPED:
        return SourceText(content, *_SHIPPED[sha256])
    name = "".join(c if c.isprintable() else "?" for c in path.name)  # it is shown wherever the trace is
    return SourceText(content, f"{name} (SHA-256 {sha256[:16]}{'' if whole else ', cut'})", None)


def tokenize(model: LoadedModel, content: str) -> NDArray[np.int64]:
    """Token ids of a text, without special tokens, shape (tokens,).

    Raises
    ------
    SpecError
        The tokenizer gives ids that the network has no embedding for.
    """
    ids = np.asarray(model.tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < model.vocab:
        raise SpecError(f"its tokenizer gives the id {int(ids.max())}, its vocabulary has {model.vocab}",
                        file=model.name)
    return ids


def split_tokens(ids: NDArray[np.int64], *, calibration: int, capture: int, evaluation: int, file: str) -> TokenParts:
    """The first `calibration`, `capture` and `evaluation` tokens of the three thirds of a text.

    Raises
    ------
    SpecError
        A third is too short for its part.
    """
    third = ids.size // 3
    for name, count in (("calibration", calibration), ("capture (context included)", capture),
                        ("evaluation", evaluation)):
        if count > third:
            raise SpecError(f"is too short: it has {ids.size} tokens, and a third of them ({third}) must hold the "
                            f"{count} of the {name} part", file=file)
    return TokenParts(ids[:calibration], ids[third:third + capture], ids[2 * third:2 * third + evaluation], third)
