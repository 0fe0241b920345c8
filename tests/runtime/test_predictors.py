"""Does a predictor that was fitted ask for what its formula says, and does the network then compute just that?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmem.errors import SimmemError
from simmem.runtime import predictors
from simmem.runtime.capture import capture_from
from simmem.runtime.experts import RouterHooks
from simmem.runtime.lowrank import RIDGE, FfnInputs, LowRank, Moments, solve
from simmem.runtime.measure import perplexity
from simmem.runtime.passes import run_dense
from simmem.runtime.predictors import Fitted, predictor_hooks, threshold_for
from simmem.runtime.text import tokenize
from simmem.trace.trace import Trace
from tests.runtime.tiny import DENSE, MIXTURES, N_LAYERS, N_UNITS, POSITIONS, PROSE, SMALL, each, layers_of, make

torch = pytest.importorskip("torch")

BOTH: dict[str, Any] = {**SMALL, "levels": (), "predictors": ("low-rank", "gate"), "rank": 16, "recall": 0.9}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unpacked(bits: Any, n_units: int = N_UNITS) -> Any:
    return np.unpackbits(bits, axis=-1, count=n_units, bitorder="little").astype(bool)


def moments_of(x: Any, y: Any) -> Moments:
    found = Moments(x.shape[1], y.shape[1], torch.device("cpu"))
    for part in np.array_split(np.arange(len(x)), 3):
        found.add(torch.from_numpy(x[part]).float(), torch.from_numpy(y[part]).float())
    return found


def test_full_rank_is_ridge_regression_and_a_lower_one_its_best_approximation() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(400, 7)) @ rng.normal(size=(7, 7)) + rng.normal(size=7)).astype(np.float32)
    y = (x @ rng.normal(size=(7, 12)) > 0.3).astype(np.float32)
    centred, offset = x - x.mean(axis=0), y - y.mean(axis=0)
    gram = centred.T @ centred / 400
    gram = gram + RIDGE * np.trace(gram) / 7 * np.eye(7)
    full = np.linalg.solve(gram, centred.T @ offset / 400)
    first, second, bias = solve(moments_of(x, y), 99)
    np.testing.assert_allclose(first @ second, full, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(x.mean(axis=0) @ first @ second + bias, y.mean(axis=0), atol=1e-4)

    def loss(b: Any) -> float:  # what a map costs above the best one
        d = b - full
        return float(np.trace(d.T @ gram @ d))

    for rank in (1, 3, 6):
        first, second, _ = solve(moments_of(x, y), rank)
        assert first.shape == (7, rank) and second.shape == (rank, 12)
        singular = np.linalg.svd(np.linalg.cholesky(gram).T @ full, compute_uv=False)
        assert loss(first @ second) == pytest.approx((singular[rank:] ** 2).sum(), rel=1e-2), "Eckart and Young's bound"


def test_masks_that_a_line_separates_are_known_without_a_miss() -> None:
    rng = np.random.default_rng(1)
    x = np.eye(9)[rng.integers(0, 9, 600)].astype(np.float32)  # nine kinds of token, each with units of its own
    y = (rng.random((9, 31)) < 0.3)[x.argmax(axis=1)]
    first, second, bias = solve(moments_of(x, y), 9)
    scores = x @ first @ second + bias
    assert ((scores > threshold_for(scores[y], 1.0)) == y).all()


@pytest.mark.parametrize(("recall", "expected"), [(1.0, 5), (0.8, 4), (0.81, 5), (0.2, 1), (0.01, 1)])
def test_a_threshold_leaves_the_wanted_share_above_it(recall: float, expected: int) -> None:
    scores = np.array([3, -1, 0.5, 7, 2], np.float32)
    threshold = threshold_for(scores.copy(), recall)
    assert (scores > np.float32(threshold)).sum() == expected
    assert threshold_for(np.zeros(0, np.float32), recall) == np.inf


# --- in the network -----------------------------------------------------------------------------------------------


def a_low_rank(ahead: int, d: int) -> Fitted:
    """Any map: what it asks for does not matter, but it must ask for some and not for others."""
    rng = np.random.default_rng(ahead)
    first, second = rng.normal(size=(N_LAYERS, d, 3)), rng.normal(size=(N_LAYERS, 3, N_UNITS))
    bias = rng.normal(size=(N_LAYERS, N_UNITS))
    maps = [part.astype(np.float32) for part in (first, second, bias)]
    return Fitted(np.zeros(N_LAYERS, np.float32), 1, LowRank(ahead, *maps))


@each(DENSE)
@pytest.mark.parametrize("ahead", [0, 1])
def test_the_network_computes_what_was_asked_for_and_nothing_else(family: str, ahead: int) -> None:
    """Against a network without the columns of the last projection that were not asked for."""
    model = make(family)
    d, last = model.d_model, DENSE[family][2][1]
    ids = torch.from_numpy(tokenize(model, PROSE.content)[:1][None])  # one token, so that a unit is asked for or not
    masks: dict[int, Any] = {}
    fitted = a_low_rank(ahead, d)
    seen: dict[int, Any] = {}
    inputs = DENSE[family][2][0][0]
    where = inputs.rpartition(".")[0] or inputs
    handles = [layers_of(model)[layer].get_submodule(where).register_forward_pre_hook(
        lambda _m, args, layer=layer: seen.update({layer: args[0].reshape(-1, d)})) for layer in range(N_LAYERS)]
    handles.append(layers_of(model)[0].register_forward_pre_hook(
        lambda _m, args, named: seen.update({-1: (args or (named["hidden_states"],))[0].reshape(-1, d)}),
        with_kwargs=True))
    hooks = predictor_hooks(model, fitted, on_mask=lambda layer, mask: masks.update({layer: mask}))
    with torch.inference_mode(), hooks:
        found = model.network(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    assert fitted.low_rank is not None
    for layer in range(N_LAYERS):
        x = seen[layer - ahead].numpy()
        maps = fitted.low_rank
        by_hand = x @ maps.first[layer] @ maps.second[layer] + maps.bias[layer] > 0
        np.testing.assert_array_equal(masks[layer], by_hand)
        assert 0 < by_hand.sum() < by_hand.size
        column = layers_of(model)[layer].get_submodule(last).weight.detach()
        column[:, torch.from_numpy(~masks[layer][0])] = 0.0
    with torch.inference_mode():
        expected = model.network(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_recorded_beside_the_trace_and_the_same_again_when_it_was_stopped(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    plain = capture_from(model, PROSE, **{**SMALL, "levels": ()})
    whole = capture_from(model, PROSE, **BOTH)
    np.testing.assert_array_equal(whole.active, plain.active)
    assert whole.header.digest == plain.header.digest
    rows = [p for p in whole.header.predictors if p.held]
    assert [(p.name, p.layers_ahead, p.rank) for p in rows] == [("gate", 0, None), ("low-rank", 0, 16),
                                                                ("low-rank", 1, 16)]
    active = unpacked(whole.active)
    for row, bits in zip(rows, whole.extras["asked"], strict=True):
        asked = unpacked(bits)
        assert row.recall == pytest.approx((active & asked).sum() / active.sum())
        assert row.precision == pytest.approx((active & asked).sum() / asked.sum())
        assert 0.75 < row.recall < 1.0 and row.quality is not None
        matrices, units = (2, row.params / model.d_model) if row.name == "gate" else (3, 0)
        assert row.unit_bytes == matrices * model.d_model * 2
        assert units in (0, N_LAYERS * N_UNITS)
        assert row.name == "gate" or row.params == N_LAYERS * (16 * (model.d_model + N_UNITS) + N_UNITS)

    # Stopped before the recording, then again while perplexities are measured.
    class Stop(Exception):
        pass

    def stop(*_args: Any, **_named: Any) -> Any:
        raise Stop

    monkeypatch.setattr("simmem.runtime.capture.forced_pass", stop)
    with pytest.raises(Stop):
        capture_from(model, PROSE, partial=tmp_path / "p", **BOTH)
    monkeypatch.undo()
    monkeypatch.setattr(predictors, "_fit", stop)  # it is not fitted again
    monkeypatch.setattr(predictors, "perplexity", stop)
    with pytest.raises(Stop):
        capture_from(model, PROSE, partial=tmp_path / "p", resume=True, **BOTH)
    monkeypatch.setattr(predictors, "perplexity", perplexity)
    again = capture_from(model, PROSE, partial=tmp_path / "p", resume=True, **BOTH)
    assert again.header.predictors == whole.header.predictors
    np.testing.assert_array_equal(again.extras["asked"], whole.extras["asked"])
    for change in ({"rank": 15}, {"recall": 0.8}, {"predictors": ("gate",)}):
        with pytest.raises(SimmemError, match="another request"):
            capture_from(model, PROSE, partial=tmp_path / "p", resume=True, **{**BOTH, **change})


def test_groups_of_layers_are_fitted_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = make("llama"), []
    for limit in (1, 1 << 30):
        fit = predictors._fit
        monkeypatch.setattr(predictors, "_fit", lambda *args, fit=fit, limit=limit: fit(*args[:-1], limit))
        found.append(capture_from(model, PROSE, **BOTH))
        monkeypatch.undo()
    np.testing.assert_array_equal(found[0].extras["asked"], found[1].extras["asked"])


@pytest.mark.parametrize("asked", [
    {"criterion": "gate", "skip": "neuron", "predictors": ("gate",)},
    {"criterion": "gate", "skip": "neuron", "predictors": ("gate",), "observe": True},
])
def test_the_gate_knows_the_units_of_its_own_criterion(asked: dict[str, Any]) -> None:
    trace = capture_from(make("llama"), PROSE, **{**SMALL, "levels": (), **asked})
    row = trace.header.predictors[-1]
    assert (row.name, row.recall, row.precision, row.wasted_bytes_per_token) == ("gate", 1.0, 1.0, 0.0)
    np.testing.assert_array_equal(trace.extras["asked"][0], trace.active)
    assert row.quality is not None and trace.header.quality is not None
    assert row.quality.sparse_perplexity == trace.header.quality.sparse_perplexity


def test_the_gate_asks_for_what_lies_above_its_threshold() -> None:
    """Its score by hand, from the input of the activation."""
    model = make("llama")
    trace = capture_from(model, PROSE, **{**BOTH, "predictors": ("gate",), "observe": True, "tokens": 16, "rank": None})
    ids = tokenize(model, PROSE.content)
    third = ids.size // 3
    scores: list[Any] = []
    handles = [layer.mlp.gate_proj.register_forward_hook(
        lambda _m, _i, out: scores.append(torch.nn.functional.silu(out)[0].abs().numpy()))
        for layer in layers_of(model)]
    run_dense(model, ids[third: third + 24 + 16])
    for handle in handles:
        handle.remove()
    asked = unpacked(trace.extras["asked"][0])
    for layer in range(N_LAYERS):
        mine = scores[layer][24:]
        assert mine[asked[:, layer]].min() > mine[~asked[:, layer]].max()


def test_two_tokens_fit_a_map_and_a_threshold() -> None:
    trace = capture_from(make("llama"), PROSE, **{**BOTH, "predictor_tokens": 2})
    assert all(row.asked_share > 0 for row in trace.header.predictors), "not one that never asks for anything"


@pytest.mark.parametrize("value", [0.0, 1.7])
def test_inputs_that_are_all_alike_give_a_map_of_finite_numbers(value: float) -> None:
    """The embedding of a text of one token: what is asked for is then what is active most often."""
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.random((500, 9)) < np.linspace(0, 1, 9)).float()
    moments = Moments(4, 9, torch.device("cpu"))
    moments.add(torch.full((500, 4), value), y)
    first, second, bias = solve(moments, 2)
    score = np.full(4, value, np.float32) @ first @ second + bias
    np.testing.assert_allclose(score, y.mean(dim=0).numpy(), atol=1e-3)


@pytest.mark.parametrize(("family", "asked"), [
    ("opt", {"criterion": "relu-zero", "predictors": ("low-rank",)}),
    ("gemma3", {"criterion": "top-k", "predictors": ("low-rank", "gate"), "decode": True}),
    ("phi3", {"criterion": "magnitude", "predictors": ("low-rank",), "batch": 2, "tokens": 20}),
])
def test_other_families_criteria_and_ways_to_run(family: str, asked: dict[str, Any]) -> None:
    model = make(family)
    trace = capture_from(model, PROSE, **{**SMALL, **({} if family == "opt" else {"levels": ()}), **asked})
    for row in trace.header.predictors:
        if row.held:
            assert row.recall > trace.active_share, "better than asking for as many at random"
            assert row.quality is not None
            whole = (3 if model.gated else 2) * model.d_model * 2
            assert row.unit_bytes == (whole if row.name == "low-rank" else whole - model.d_model * 2)


# --- experts ------------------------------------------------------------------------------------------------------


@each(MIXTURES)
def test_the_next_layers_experts_are_guessed_by_its_router_on_this_layers_input(family: str) -> None:
    model = make(family)
    if len(model.experts) < 2:
        model = make(family, first_k_dense_replace=0)
    trace: Trace = capture_from(model, PROSE, **SMALL)
    rows = [p for p in trace.header.predictors if p.name == "next-layer"]
    ids = tokenize(model, PROSE.content)
    third = ids.size // 3
    inputs: list[Any] = []
    handles = [block.router.register_forward_pre_hook(
        lambda _m, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]))) for block in model.experts]
    run_dense(model, ids[third: third + 24 + 40])
    for handle in handles:
        handle.remove()
    with torch.inference_mode():
        guess = model.experts[1].router(inputs[0])
    logits = (guess[0] if isinstance(guess, tuple) else guess).numpy()[24:64]
    used = unpacked(trace.active, trace.header.n_units)[:40, 1]
    for row, k in zip(rows, (2, 3, 4), strict=True):
        asked = np.zeros_like(used)
        np.put_along_axis(asked, np.argsort(-logits, axis=1, kind="stable")[:, :k], True, axis=1)
        assert row.recall == pytest.approx((asked & used).sum() / used.sum())
        assert row.recall_by_layer[0] is None and row.asked_share == pytest.approx(k / trace.header.n_units)
        if row.held:
            np.testing.assert_array_equal(unpacked(trace.asked_by("next-layer")[1], trace.header.n_units)[:, 1], asked)
            assert not trace.asked_by("next-layer")[1][:, 0].any(), "nothing is known before the first"


def test_guessing_leaves_the_network_as_it_is() -> None:
    model = make("mixtral")
    ids = torch.from_numpy(tokenize(model, PROSE.content)[None, :POSITIONS])
    orders: list[int] = []
    with torch.inference_mode():
        plain = model.network(input_ids=ids).logits
        with RouterHooks(model, on_guess=lambda index, _order: orders.append(index)):
            hooked = model.network(input_ids=ids).logits
    assert torch.equal(plain, hooked) and orders == [1]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "asked", "says"), [
    ("llama", {"predictors": ("oracle",)}, "no predictor named"),
    ("llama", {"predictors": ("gate",), "recall": 0.0}, "--recall"),
    ("llama", {"predictors": ("gate",), "recall": float("nan")}, "--recall"),
    ("llama", {"predictors": ("low-rank",), "rank": 0}, "--rank"),
    ("llama", {"rank": 4}, "--predictor"),
    ("llama", {"predictors": ("gate",), "skip": "known"}, "whole neurons"),
    ("opt", {"predictors": ("gate",)}, "gated"),
    ("mixtral", {"predictors": ("low-rank",)}, "does not go with the unit expert"),
])
def test_what_makes_no_sense_is_refused(family: str, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(SimmemError) as refused:
        capture_from(make(family), PROSE, **{**SMALL, **asked})
    assert says in str(refused.value)


def test_a_network_that_yields_nan_is_refused() -> None:
    model = make("llama")
    layers_of(model)[1].mlp.up_proj.weight.detach()[0, 0] = float("nan")
    with pytest.raises(SimmemError, match="NaN"):
        capture_from(model, PROSE, **{**BOTH, "criterion": "top-k"})


def test_the_inputs_of_layers_are_let_go() -> None:
    model = make("llama")
    with FfnInputs(model) as inputs:
        run_dense(model, tokenize(model, PROSE.content)[:9])
        assert inputs.before(1, 0).shape == inputs.before(0, 1).shape == (9, model.d_model)
    assert dataclasses.is_dataclass(LowRank) and not any(m._forward_pre_hooks for m in model.network.modules())
