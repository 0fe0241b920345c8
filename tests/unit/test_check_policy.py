"""Does `check_policy` pass what is right, on any device and model, and catch each way of being wrong?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.policy.base import Block, Knob, Placement, Policy, policies
from simmem.policy.check import check_policy, example_contexts
from simmem.policy.context import Context
from simmem.policy.families.stream import Stream
from simmem.schedule import Schedule
from tests.strategies import contexts

NEUTRAL: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "resident": [],
    "stream": [({"resident_ratio": 1.0, "prefetch_layers": 0, "reader_threads": 1},
                {"resident_ratio": 1.0, "prefetch_layers": 2, "reader_threads": 64})],
    "layer-split": [],
    "layer-stream": [({"resident_layers": 13, "buffers": 1, "source_tier": "host"},
                      {"resident_layers": 13, "buffers": 3, "source_tier": "storage"})],
    "tier-percent": [({"cpu_attention": True, "kv_percent": (100.0, 0.0)},
                      {"cpu_attention": False, "kv_percent": (100.0, 0.0)})],
    "hot-cold": [],
    "expert-cache": [],
    "flash-window": [({"predictor": "none", "window_tokens": 0, "bundled": True, "coalesce": False},
                      {"predictor": "none", "window_tokens": 2, "bundled": False, "coalesce": True})],
}


@pytest.mark.parametrize("name", sorted(policies()))
def test_the_built_in_policies_keep_the_contract(name: str) -> None:
    check_policy(policies()[name], same=NEUTRAL[name])


@given(contexts(), st.sampled_from(sorted(policies())), st.integers(0, 99))
def test_they_keep_it_on_any_device_and_model(context: Context, name: str, seed: int) -> None:
    check_policy(policies()[name], context, seed=seed)


@given(contexts(trace=False))
def test_without_a_trace_too(context: Context) -> None:
    for policy in policies().values():
        check_policy(policy, context)


# --------------------------------------------------------------------------------------- what is caught


class Changed(Stream):
    """A stream with something wrong."""

    name = "changed"
    wrong = ""

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        knobs = super().knobs(context)
        ratio = next(k for k in knobs if k.name == "resident_ratio")
        bad = {"no values": replace(ratio, values=()), "default outside": replace(ratio, default=1.5),
               "no help": replace(ratio, help="")}
        if self.wrong in bad:
            knobs = tuple(bad[self.wrong] if k is ratio else k for k in knobs)
        return (*knobs, knobs[0]) if self.wrong == "twin knobs" else knobs

    def decode(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
        return self._spoil(context, super().decode(context, block, rows), block)

    def prefill(self, context: Context, block: Block) -> Schedule:
        return self._spoil(context, super().prefill(context, block), block)

    def _spoil(self, context: Context, s: Schedule, block: Block) -> Schedule:
        read = "link." + context.storage_link[0]
        landed = "memory." + context.device.host
        match self.wrong:
            case "negative":
                return replace(s, flop=s.flop - 1e9)
            case "not a number":
                return replace(s, bytes={**s.bytes, landed: s.bytes[landed] * np.nan})
            case "wrong shape":
                return s.columns(np.arange(s.n_candidates - 1))
            case "bytes that land nowhere":
                return replace(s, bytes={**s.bytes, landed: s.bytes[landed] * 0.5})
            case "bytes without a request":
                return replace(s, requests=s.requests * 0.0)
            case "unknown resource":
                return replace(s, bytes={**s.bytes, "memory.l2": s.flop * 0})
            case "unknown agent":
                classes = tuple(replace(c, agent="npu") if c.agent else c for c in s.classes)
                return replace(s, classes=classes)
            case "ends no token":
                return replace(s, token_ends=())
            case "late dependency":
                return replace(s, deps=((s.n_ops - 1,), *s.deps[1:]))
            case "reads nothing" if read in s.bytes:  # everything streamed is there by magic
                links = [k for k, c in enumerate(s.classes) if c.link]
                gone = {name: table.copy() for name, table in s.bytes.items()}
                for table in gone.values():
                    table[links] = 0.0
                return replace(s, bytes=gone, requests=np.where(np.isin(np.arange(len(s.classes)), links)[:, None],
                                                                0.0, s.requests))
            case "never releases":
                return replace(s, release_bytes={})
            case "releases too much":
                return replace(s, acquire_bytes={})
            case "moody":
                self.calls = getattr(self, "calls", 0) + 1
                return replace(s, flop=s.flop * (1 + 1e-6 * self.calls))
            case "looks at its neighbours":
                return replace(s, flop=s.flop * s.n_candidates)
        return s

    def footprint(self, context: Context, block: Block) -> dict[str, NDArray[np.float64]]:
        used = super().footprint(context, block)
        fast = context.memory_of(str(block.structural["agent"]))
        if self.wrong == "no room for buffers":
            used[fast] = used[fast] - 0.9 * (used[fast] - used[fast].min())
        if self.wrong == "unknown tier":
            used["l2"] = used[fast]
        return used

    def placements(self, context: Context, block: Block) -> list[Placement]:
        return super().placements(context, block)[:-1 if self.wrong == "forgets to place" else None]

    def report(self, context: Context, block: Block, rows: NDArray[np.int64]) -> dict[str, Any]:
        report = super().report(context, block, rows)
        if self.wrong == "asks for more than it reads":
            report["requested_bytes"] += 1e9
        if self.wrong == "shares do not sum":
            report["active_share"] = {"cpu": 0.4}
        if self.wrong == "mute":
            del report["notes"]
        return report


CAUGHT = {
    "no values": "resident_ratio has no values",
    "default outside": "does not parse its own value 1.5",
    "no help": "does not say what it does",
    "twin knobs": "share a name",
    "negative": "flop is negative",
    "not a number": "not finite",
    "wrong shape": "columns, expected",
    "bytes that land nowhere": "are not the bytes of",
    "bytes without a request": "bytes without a request",
    "unknown resource": "unknown resources",
    "unknown agent": "no agent 'npu'",
    "ends no token": "no op that ends a token",
    "late dependency": "depends on a later one",
    "reads nothing": "are held or arrive|asks for",
    "never releases": "more than its footprint",
    "releases too much": "releases more",
    "moody": "twice gives two schedules",
    "looks at its neighbours": "depends on the others",
    "no room for buffers": "more than its footprint|placements put|are held or arrive",
    "unknown tier": "a tier that does not exist",
    "forgets to place": "placements put",
    "asks for more than it reads": "the schedule reads",
    "shares do not sum": "not shares of agents",
    "mute": "the report lacks notes",
}


@pytest.mark.parametrize("wrong", CAUGHT)
def test_a_broken_policy_is_caught(wrong: str) -> None:
    policy = Changed()
    policy.wrong = wrong
    with pytest.raises(SpecError, match=CAUGHT[wrong]) as caught:
        check_policy(policy)
    assert caught.value.key == "changed"
    assert "\n" not in str(caught.value)


def test_the_policy_that_is_changed_is_right() -> None:
    check_policy(Changed())


def test_a_knob_that_is_not_neutral_is_caught() -> None:
    pair = ({"resident_ratio": 0.5, "reader_threads": 8}, {"resident_ratio": 0.75, "reader_threads": 8})
    with pytest.raises(SpecError, match="differs"):
        check_policy(policies()["stream"], same=[pair])


def test_weights_that_stream_from_where_they_already_are_hold_memory() -> None:
    """The first version of `stream` let a CPU stream from its own memory: no read, no footprint, no time."""
    class Free(Stream):
        def footprint(self, context: Context, block: Block) -> dict[str, NDArray[np.float64]]:
            used = super().footprint(context, block)
            fast = context.memory_of(str(block.structural["agent"]))
            if block.structural["source_tier"] == "host" and fast == context.device.host:
                used[fast] = used[fast] - (1 - block.columns["resident_ratio"]) * context.total_bytes
            return used

    discrete = next(c for c in example_contexts() if not c.device.is_unified)
    with pytest.raises(SpecError, match=r"more than its footprint|are held or arrive"):
        check_policy(Free(), discrete)


@pytest.mark.parametrize("given", ["nan", "inf", "-1", "9", "1.5", "", None, "many", "1e999"])
def test_a_number_that_a_knob_cannot_be_is_one_clear_error(given: object) -> None:
    for high in (8, None):
        if given == "9" and high is None:
            continue
        with pytest.raises(SpecError, match="expected") as caught:
            Knob("ahead", "structural", (0, 1), "how far", low=0, high=high).parse(given)
        assert caught.value.key == "ahead"


def test_a_policy_for_every_context_must_have_knobs() -> None:
    class Shy(Stream):
        def knobs(self, context: Context) -> tuple[Knob, ...]:
            return ()

    class Torn(Stream):
        def why_not(self, context: Context) -> str | None:
            return "it is tired"

    with pytest.raises(SpecError, match="has knobs for a context that it cannot plan: it is tired"):
        check_policy(Torn())
    with pytest.raises(SpecError, match="has no knobs"):
        check_policy(Shy())


def test_every_built_in_policy_is_a_policy() -> None:
    assert all(isinstance(p, Policy) for p in policies().values())
