"""Where do the built-in devices, models, traces and reference rows live, and which names exist?

In a checkout the data folders stand beside the package; in a wheel they are inside it, under
`simmem/_data`. A name is a file stem or an alias, or a path to the user's own file.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

from simmem.errors import SpecError, UnknownNameError

__all__ = ["aliases", "data_folder", "looks_like_path", "names", "resolve"]

_FOLDERS = {
    "device": "devices",
    "model": "workloads/models",
    "trace": "workloads/traces",
    "reference": "validate/references",
}
_LOGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".jsonl.gz", ".ndjson.gz", ".csv.gz", ".tsv.gz", ".parquet")
_SUFFIXES = {"device": (".toml",), "model": (".toml",), "trace": (".toml", ".safetensors"), "reference": (".toml",)}


@cache
def data_folder() -> Path:
    """The folder that holds `devices`, `workloads` and `validate`."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "_data"
    return inside if inside.is_dir() else package.parent


@cache
def _files(what: str) -> dict[str, Path]:
    folder = data_folder() / _FOLDERS[what]
    found = {p.stem: p for p in sorted(folder.glob("*")) if p.suffix in _SUFFIXES[what]}
    if not found:
        raise SpecError(f"the installation has no {what} files", file=str(folder))
    return found


def names(what: str) -> list[str]:
    """Built-in names of a kind ("device", "model", "trace", "reference"), sorted."""
    return sorted(_files(what))


@cache
def aliases(what: str) -> dict[str, str]:
    """alias -> name, for kinds whose files carry `aliases`."""
    found: dict[str, str] = {}
    for name, path in _files(what).items():
        if path.suffix == ".toml":
            for alias in tomllib.loads(path.read_text(encoding="utf-8")).get("aliases", ()):
                found[alias] = name
    return found


def looks_like_path(name: str) -> bool:
    return "/" in name or "\\" in name or name.endswith((".toml", ".json", ".gguf", ".safetensors", ".npz"))


def resolve(what: str, name: str, *, relative_to: Path | None = None) -> Path:
    """The file behind a built-in name, an alias or a path (relative to `relative_to` when given)."""
    if what == "trace" and name.endswith(_LOGS):
        raise SpecError("is a log or a table by its name, not a trace; `simmem import` makes one of a routing log",
                        file=name)
    if looks_like_path(name):
        try:
            path = Path(name).expanduser()
            if relative_to is not None and not path.is_absolute():
                path = relative_to / path
            if path.exists():
                return path
        except (OSError, RuntimeError) as error:  # a name too long for the system; a home folder of nobody
            why = getattr(error, "strerror", None) or error
            raise SpecError(f"cannot be looked up: {why}", file=name[:200]) from None
        if name.lower() not in aliases(what):  # an alias may be a hub name such as facebook/opt-6.7b
            raise SpecError(f"no such {what} file", file=str(path))
    files = _files(what)
    key = name.lower()
    if key in files:
        return files[key]
    known = aliases(what)
    if key in known:
        return files[known[key]]
    if what == "model" and name and Path(name).is_dir():  # a downloaded model's folder, named without a slash
        return Path(name)
    raise UnknownNameError(what, name, files, aliases=known)
