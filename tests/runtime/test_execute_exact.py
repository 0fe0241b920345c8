"""Does the executor compute what transformers computes, whatever is streamed, cached, split or merged?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from simmem.errors import SpecError
from simmem.runtime.execute.exact import exact_task, run_exactly
from simmem.runtime.execute.networks import decoder_settings, network_weights, reference_run
from simmem.runtime.execute.session import How, Storage, open_session
from tests.runtime import tiny
from tests.runtime.executing import STREAM, WINDOW, candidate, drawn, long_network, spec_of, trace_of

TOKENS = 40
PREDICTED = {**WINDOW, "prefetch_layers": 1}

# family, criterion, predictor, matrices of a unit that are fetched, tokens
CRITERIA = [("opt", "relu-zero", "gate", 1, 210), ("opt", "wina", "oracle", 2, TOKENS),
            ("llama", "gate", "gate", 2, TOKENS), ("llama", "wina", "oracle", 3, 210),
            ("qwen2", "magnitude", "oracle", 3, TOKENS)]


def agreement(family: str, tmp_path: Path, policy: str, knobs: dict[str, object], *, criterion: str | None = None,
              predictor: str = "oracle", parts: int | None = None, dram: float | None = None,
              storage: Storage = "real", tokens: int = TOKENS) -> tuple[float, float, np.ndarray, np.ndarray]:
    """(largest difference, share of the same choices, units read, units active)."""
    network = long_network(family, tokens + 3)
    model = spec_of(network, tmp_path / family)
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, tokens)
    thresholds = (0.0, 0.0) if criterion == "relu-zero" else (0.05, 0.08)
    reference = reference_run(network, ids, criterion=criterion, thresholds=thresholds)
    trace = None
    if criterion is not None:
        trace = trace_of(drawn(model, 12), model, parts=parts, predictor=predictor)
    task = exact_task(candidate(model, policy, knobs, trace=trace, dram=dram), reference)
    how = How(source=network_weights(network, "fp32"), threads=1, check=True, scratch=tmp_path, storage=storage)
    with open_session(task, how) as session:
        found = run_exactly(session, ids, reference, decoder_settings(network, model.architecture, tokens))
    assert found.agrees is (found.largest_difference <= found.tolerance)
    active = np.zeros(0) if reference.active is None else np.bitwise_count(reference.active).sum(axis=2)
    return found.largest_difference, found.same_choice, found.counted.new_units, active


def test_a_window_shorter_than_the_text(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="sliding-window attention"):
        agreement("mistral", tmp_path, "stream", STREAM)


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2"])
@pytest.mark.parametrize("ratio", [0.0, 0.37, 0.9])
def test_streamed_weights(family: str, ratio: float, tmp_path: Path) -> None:
    for ahead in (0, 2):
        difference, same, _, _ = agreement(family, tmp_path, "stream",
                                           {**STREAM, "resident_ratio": ratio, "prefetch_layers": ahead})
        assert difference < 2e-5
        assert same == 1.0


def test_everything_resident(tmp_path: Path) -> None:
    difference, same, _, _ = agreement("llama", tmp_path, "resident", {"agent": "cpu"})
    assert difference < 2e-5
    assert same == 1.0


@pytest.mark.parametrize(("family", "criterion", "predictor", "parts", "tokens"), CRITERIA)
def test_fetched_neurons(family: str, criterion: str, predictor: str, parts: int, tokens: int, tmp_path: Path) -> None:
    difference, same, read, active = agreement(family, tmp_path, "flash-window", WINDOW, criterion=criterion,
                                               predictor=predictor, parts=parts, tokens=tokens)
    assert difference < 2e-5
    assert same == 1.0
    assert read.sum() < active.sum(), "a window of three tokens hits"
    assert read[0].tolist() == active[0].tolist(), "the first token finds nothing"


@pytest.mark.parametrize("changes", [
    {"window_tokens": 0}, {"coalesce": True}, {"bundled": False}, {"coalesce": True, "bundled": False},
    {"attention_resident": 0.3}, {"prefetch_layers": 1}, {"window_tokens": 0, "coalesce": True, "bundled": False},
], ids=str)
def test_every_knob(changes: dict[str, object], tmp_path: Path) -> None:
    for storage in ("real", "emulated"):
        difference, same, read, active = agreement("llama", tmp_path, "flash-window", {**WINDOW, **changes},
                                                   criterion="wina", parts=3, storage=storage)
        assert difference < 2e-5
        assert same == 1.0
        if changes.get("window_tokens") == 0:
            assert (read == active).all()


def test_a_gate_is_not_asked_early(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="prefetch_layers"):
        agreement("llama", tmp_path, "flash-window", PREDICTED, criterion="gate", predictor="gate", parts=2)


def test_a_wrong_weight_is_seen(tmp_path: Path) -> None:
    """The comparison can fail."""
    network = tiny.make("llama")
    model = spec_of(network, tmp_path / "model")
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, 30)
    reference = reference_run(network, ids)
    with torch.no_grad():
        tiny.layers_of(network)[1].mlp.up_proj.weight[3] *= 1.01
    task = exact_task(candidate(model, "resident", {"agent": "cpu"}), reference)
    with open_session(task, How(source=network_weights(network, "fp32"), threads=1, scratch=tmp_path)) as session:
        found = run_exactly(session, ids, reference, decoder_settings(network, model.architecture, 30))
    assert not found.agrees


@pytest.mark.slow  # a model of 135 million parameters over 200 tokens of text
def test_a_real_gated_model(tmp_path: Path) -> None:
    from simmem.planner.candidate import Candidate, blocks
    from simmem.planner.question import ask
    from simmem.policy.base import policy_named
    from simmem.runtime.execute.exact import compare_with_network

    knobs = {**WINDOW, "predictor": "oracle", "agent": "cpu"}
    question = ask("cloud-vm", "smollm2-135m", policy="flash-window", knobs=knobs, weights="fp32",
                   trace="smollm2-135m-wina-50")
    context, policy = question.context("fp32"), policy_named("flash-window")
    found = next(iter(blocks(policy, context, knobs)))
    _, agreed = compare_with_network(Candidate(context, policy, found), "smollm2-135m",
                                     How(threads=2, scratch=tmp_path))
    assert agreed.tokens >= 200
    assert agreed.agrees
    assert agreed.same_choice == 1.0
