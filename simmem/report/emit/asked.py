"""What does an engine have to realise? A plan, read for the questions that every engine asks of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from simmem.errors import SimmemError
from simmem.planner.document import Emission, Plan
from simmem.policy.base import one_value
from simmem.policy.context import Context
from simmem.spec import library
from simmem.spec.model import Model
from simmem.units import format_quantity

__all__ = ["Asked", "Realise", "by_policy", "cannot", "dropped_parts", "realised", "size"]

_HUB = re.compile(r"huggingface\.co/([\w.-]+/[\w.-]+)")


@dataclass(frozen=True)
class Asked:
    """A plan, and what it was made from."""

    plan: Plan
    context: Context

    @property
    def model(self) -> Model:
        return self.context.model

    @property
    def agent(self) -> str:
        """The unit that computes."""
        return str(self.plan.policy.knobs["agent"])

    @property
    def fast(self) -> str:
        """The memory it computes out of."""
        return self.context.memory_of(self.agent)

    @property
    def on_own_memory(self) -> bool:
        """Whether that is memory of its own (a graphics card's) rather than the system's."""
        return self.context.device.memory[self.fast].kind == "device"

    @property
    def source(self) -> str:
        """Where streamed weights come from."""
        device = self.context.device
        return device.host if self.plan.policy.knobs.get("source_tier") == "host" else device.storage

    @property
    def share(self) -> float:
        """Share of the weights that stays resident."""
        return 1.0 if self.source == self.fast else float(one_value(self.plan.policy.knobs.get("resident_ratio", 1.0)))

    @property
    def weights(self) -> str:
        return self.plan.workload.weights

    @cached_property
    def path(self) -> Path | None:
        """The checkpoint on this machine, where the plan was asked for one: a GGUF file or a folder."""
        try:
            path = library.resolve("model", self.plan.model)
        except SimmemError:
            return None
        if path.suffix == ".gguf" or path.is_dir():
            return path
        return path.parent if path.suffix == ".json" else None

    @property
    def is_gguf(self) -> bool:
        return self.path is not None and self.path.suffix == ".gguf"

    @property
    def checkpoint(self) -> str | None:
        """A folder, or a name on the Hugging Face hub; None where the model file tells neither."""
        if self.path is not None:
            return str(self.path)
        named = _HUB.search(self.model.source)
        return named[1] if named else None

    def over_budget(self, tier: str, extra_bytes: float) -> float:
        """Bytes by which a tier would be over its budget if it held so much more than planned; 0 where it fits."""
        use = self.plan.memory[tier]
        return max(use.used_bytes + extra_bytes - use.budget_bytes, 0.0)

    def instead_of_this(self) -> str:
        """What dense streaming would take, as far as the plan says."""
        streamed = [b for b in self.plan.baselines if b.policy.startswith("stream")]
        if not streamed:
            return ""
        slow = max(streamed, key=lambda b: b.token_latency_s)
        return (f" ({slow.policy}: {format_quantity(slow.token_latency_s, 's')} a token on the planner's figures, "
                f"against {format_quantity(self.plan.predicted.token_latency_s, 's')} of this plan)")


Realise = Callable[[Asked], Emission]
"""What an engine does with a plan of one policy."""


def size(value: float) -> str:
    return format_quantity(value, "bytes")


def realised(engine: str, *, differs: list[str], cannot: list[str], exact: bool, text: str,
             prepare: list[str] | None = None, arguments: list[str] | None = None,
             device_map: dict[str, int | str] | None = None, load: Mapping[str, object] | None = None) -> Emission:
    """Settings that realise a plan, exactly or as near as the engine comes."""
    return Emission(engine=engine, realises="exact" if exact and not cannot else "nearest", prepare=prepare or [],
                    arguments=arguments, device_map=device_map, load=None if load is None else dict(load), text=text,
                    cannot=cannot, differs=differs, instead=None)


def by_policy(engine: str, policies: Mapping[str, Realise], asked: Asked, lacks: list[str]) -> Emission:
    """What an engine makes of a plan, given what it lacks whatever the policy."""
    name, w = asked.plan.policy.name, asked.plan.workload
    if w.mixed:
        return cannot(engine, [*lacks, f"hold weights at {w.label}: the settings that simmem writes have one precision "
                                       "for all matrices"])
    known = policies.get(name)
    if known is None:
        return cannot(engine, [*lacks, f"the policy {name}: simmem knows no settings that do the same"])
    found = known(asked)
    if not lacks:
        return found
    return cannot(engine, [*lacks, *(found.cannot if found.realises == "no" else [])])


def cannot(engine: str, parts: list[str], instead: str | None = None) -> Emission:
    """No settings: what the engine lacks, and the nearest that it has."""
    return Emission(engine=engine, realises="no", prepare=[], arguments=None, device_map=None, load=None, text=None,
                    cannot=parts, differs=[], instead=instead)


def dropped_parts(asked: Asked) -> list[str]:
    """The parts of a flash-window plan, in words that hold for any engine that multiplies whole matrices."""
    knobs = asked.plan.policy.knobs
    parts = []
    if knobs["predictor"] != "none":
        parts.append(f"skip FFN neurons (predictor: {knobs['predictor']}): every row of every matrix is multiplied "
                     "for every token")
        parts.append(f"keep the neurons of the last {knobs['window_tokens']} tokens: there is no cache of neurons")
    parts.append("read single neurons from storage"
                 + (", row and column as one bundle" if knobs["bundled"] else "")
                 + (", near ones merged" if knobs["coalesce"] else "") + ": a checkpoint has whole matrices")
    parts.append(f"keep {knobs['reader_threads']} reads in flight")
    attention = float(one_value(knobs["attention_resident"]))
    if attention < 1:
        parts.append(f"hold {attention:.0%} of embeddings and attention resident")
    return parts
