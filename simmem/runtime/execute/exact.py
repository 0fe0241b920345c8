"""Does the executor compute what the network computes? The same text, the same units, logit by logit.

The network itself runs first, whole or masked by the criterion of a trace, and leaves its logits and its masks. Then
the plan runs over the same tokens with the network's weights in its file, reading only the units of the masks. Summing
in another order is all that may differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmem.errors import MachineError, SpecError
from simmem.planner.candidate import Candidate
from simmem.policy.context import Replayed
from simmem.runtime.execute.engine import Counted
from simmem.runtime.execute.layout import layout_of
from simmem.runtime.execute.networks import (
    DecoderSettings,
    Reference,
    decoder_settings,
    network_weights,
    reference_run,
)
from simmem.runtime.execute.session import How, Session, open_session
from simmem.runtime.execute.task import HotTask, Task, task_of
from simmem.runtime.models import load_network
from simmem.runtime.text import default_text_path, read_text, tokenize
from simmem.schedule import Schedule
from simmem.trace.trace import Trace, digest_of

__all__ = ["TOLERANCE", "Agreement", "ExactHotTask", "ExactTask", "compare_with_network", "exact_task", "run_exactly"]

Ints = NDArray[np.int64]

LEAST_TOKENS = 200
"""Tokens of text that are compared at least."""

TOLERANCE = {"fp32": 2e-5, "bf16": 0.05, "fp16": 0.01}
"""Largest difference between logits that the order of summing explains, as a share of the largest logit: some
thousand roundings of 6e-8 in fp32; in bf16, with a rounding of 4e-3 at every store, some ten of those."""


@dataclass(frozen=True)
class Agreement:
    """How the executor's logits compare with the network's."""

    tokens: int
    largest_difference: float
    """As a share of the largest logit."""
    same_choice: float
    """Share of tokens whose likeliest next token is the same."""
    tolerance: float
    counted: Counted

    @property
    def agrees(self) -> bool:
        return self.largest_difference <= self.tolerance


class ExactTask(Task):
    """A task over a given text, from its first token on; rows of the window table begin where a window is full."""

    @cached_property
    def schedule(self) -> Schedule:
        rows = np.arange(len(self.candidate.context.table.tokens)) if self.by_neuron else np.zeros(1, np.int64)
        return self.candidate.policy.decode(self.candidate.context, self.candidate.block, rows)

    @cached_property
    def unit_bytes(self) -> NDArray[np.float64]:
        """While the caches fill, a token may read all it uses. [B]"""
        layout, trace = self.layout, self.candidate.context.trace
        if layout.units is None or trace is None:
            return np.zeros((1, len(layout.layers)))
        units = layout.units.rows if self.coalesce else int(trace.active_counts.max())
        return np.full((1, len(layout.layers)), float(units * layout.areas_per_layer * layout.units.slot_bytes))

    def active(self, token: int) -> list[Ints]:
        trace = self.candidate.context.trace
        assert trace is not None
        return _units(trace.active[token], trace.header.n_units)


@dataclass(frozen=True)
class ExactHotTask(HotTask):
    """The same on two units, which hold what the plan's own trace says."""

    masks: NDArray[np.uint8]
    """Packed bits (tokens, layers, ceil(units / 8)) of the units that the text uses."""

    @cached_property
    def schedule(self) -> Schedule:
        return self._decode(np.zeros(1, np.int64))  # of any token: amounts that differ are not asked for

    def active(self, token: int) -> list[Ints]:
        return _units(self.masks[token], self.hot.shape[1])


def exact_task(candidate: Candidate, reference: Reference) -> ExactTask | ExactHotTask:
    """The candidate over the text of a reference run, its trace's activity replaced by the run's own masks.

    Raises SpecError where the plan fetches units and the reference was not masked, or the other way round.
    """
    context = candidate.context
    tokens = int(reference.logits.shape[0])
    if candidate.policy.name == "hot-cold" and reference.active is not None:
        shared = task_of(candidate, 1)
        return ExactHotTask(candidate, shared.layout, tokens, 0, 0, reference.active)
    if reference.active is not None:
        if context.trace is None:
            raise SpecError("the plan has no trace to run by", key="trace")
        known = context.asking(str(candidate.knobs.get("predictor")), 0)
        assert known.trace is not None
        header = known.trace.header.model_copy(update={
            "n_tokens": tokens, "tensors": {}, "curves": (), "predictors": (), "digest": digest_of(reference.active)})
        replayed = Replayed(Trace(header, reference.active), longest_window=known.table.max_window)
        candidate = replace(candidate, context=replace(known, replayed=replayed))
    made = task_of(candidate, 1)
    if made.by_neuron != (reference.active is not None):
        raise SpecError("fetches single neurons, so the network has to be masked, and only then",
                        key="policy.name")
    if made.prefetch and made.known_first and made.by_neuron:
        raise SpecError("a gate asked early is not the gate of its layer: found prefetch_layers above 0",
                        key="prefetch_layers")
    return ExactTask(candidate, layout_of(candidate.context, by_neuron=made.by_neuron, bundled=made.layout.bundled),
                     tokens, 0, 0)


def _units(packed: NDArray[np.uint8], n_units: int) -> list[Ints]:
    return [np.flatnonzero(row) for row in np.unpackbits(packed, axis=1, bitorder="little", count=n_units)]


def run_exactly(session: Session, ids: Ints, reference: Reference, settings: DecoderSettings) -> Agreement:
    """Run an `ExactTask` over its text and compare every token's logits.

    Raises MachineError where a logit is not finite: then nothing can be compared.
    """
    task, n = session.task, len(ids)
    decoder = session.decoder(n, rotary=settings.rotary, epsilon=settings.epsilon,
                              position_offset=settings.position_offset)
    worst, same = 0.0, 0
    scale = float(reference.logits.abs().max())

    def compare(number: int) -> None:
        nonlocal worst, same
        logits = decoder.logits[0].float().cpu()
        difference = float((logits - reference.logits[number]).abs().max())
        if not np.isfinite(difference):
            raise MachineError(f"token {number} yields logits that are not finite", file=task.layout.model)
        worst = max(worst, difference)
        same += int(int(logits.argmax()) == int(reference.logits[number].argmax()))

    engine = session.drive(decoder, n, ids=ids, exact=task.by_neuron, after=compare)
    return Agreement(n, worst / scale, same / n, TOLERANCE[task.layout.precision], engine.counted)


def compare_with_network(candidate: Candidate, network: str, how: How, *, text: Path | None = None,
                         tokens: int = LEAST_TOKENS) -> tuple[How, Agreement]:
    """Run a candidate over real text with its model's own weights; at least `LEAST_TOKENS` tokens.

    network : what `simmem.runtime.models.load_network` takes, or a config.json beside the weights.

    Returns `how` with those weights as its source, so that a timed run can use the same file, and the agreement.

    Raises
    ------
    SpecError
        The network is of a kind that cannot be run, the trace has no masks to run by, or the text is too short.
    MachineError
        The model's weights are not here.
    """
    context, precision = candidate.context, candidate.context.workload.weights
    model = load_network(network.removesuffix("config.json") or ".", dtype="bf16" if precision == "bf16" else "fp32")
    ids = tokenize(model, read_text(text or default_text_path()).content)[: max(tokens, LEAST_TOKENS)]
    limit = min(model.max_positions, context.model.architecture.max_positions)
    if len(ids) < LEAST_TOKENS or limit < len(ids):
        raise SpecError(f"found {len(ids)} tokens of text, expected {LEAST_TOKENS} to {limit}", key="--text")
    criterion: str | None = None
    thresholds: tuple[float, ...] = ()
    if task_of(candidate, 1).by_neuron:
        assert context.trace is not None
        header = context.trace.header
        if header.captured is None or header.criterion == "top-k":
            raise SpecError("says no thresholds to mask a network by; capture one with `simmem capture`", key="trace",
                            file=header.name)
        criterion, thresholds = header.criterion, header.captured.thresholds
    reference = reference_run(model, ids, criterion=criterion, thresholds=thresholds)
    task = exact_task(candidate, reference)
    settings = decoder_settings(model, context.model.architecture, len(ids))
    how = replace(how, source=network_weights(model, precision))
    with open_session(task, how) as session:
        return how, run_exactly(session, ids, reference, settings)
