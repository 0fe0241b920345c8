"""What is being asked of the model: how much text, how many sequences, at which precision?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from simmem.errors import SpecError, UnknownNameError
from simmem.spec.model import Model
from simmem.spec.precision import FILE, PRECISIONS

__all__ = ["MOST_DRAFTED", "Draft", "Workload", "mixed_precisions", "mixed_text", "weights_label"]

MOST_DRAFTED = 64
"""Longer drafts are not planned: hardly any is accepted to its end."""


@dataclass(frozen=True)
class Draft:
    """A small model that proposes tokens, which the large one verifies all in one step (Leviathan et al., 2023)."""

    model: Model
    length: int
    """Tokens proposed for each step (γ); with 0 the model is not there at all."""
    acceptance: float
    """Chance that a proposed token is accepted (α), each independent of the others."""

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance <= 1:  # also false for NaN
            raise SpecError(f"found {self.acceptance}, expected a share of drafted tokens that are accepted, from 0 "
                            "to 1", key="--acceptance")
        if not 0 <= self.length <= MOST_DRAFTED:
            raise SpecError(f"found {self.length}, expected a whole number of tokens from 0 to {MOST_DRAFTED}",
                            key="draft_length")

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens of a sequence in a step: (1 − α^(γ+1)) / (1 − α), and γ + 1 where α is 1.

        Leviathan et al., arXiv 2211.17192, equation 1; written as the sum that it is, which also holds for α = 1.
        """
        return float(sum(self.acceptance**i for i in range(self.length + 1)))

    def check(self, target: Model, context_tokens: int) -> None:
        """Raise SpecError where this model cannot draft for the target."""
        for model in (target, self.model):
            if model.architecture.state_space is not None:
                raise SpecError(f"{model.name} keeps a state, which cannot be taken back to the last token that was "
                                "accepted; expected a draft and a model with keys and values", key="--draft")
        mine, theirs = self.model.architecture.vocab, target.architecture.vocab
        if mine != theirs:
            raise SpecError(f"{self.model.name} has a vocabulary of {mine} tokens, expected the {theirs} of "
                            f"{target.name}: what it proposes must mean the same there", key="--draft")
        limit = self.model.architecture.max_positions
        if context_tokens > limit:
            raise SpecError(f"a context of {context_tokens} tokens is past the {limit} that {self.model.name} has "
                            "positions for", key="--draft")


@dataclass(frozen=True)
class Workload:
    """Tokens in and out, sequences decoded together, precisions of weights and of keys and values."""

    prompt_tokens: int = 128
    new_tokens: int = 256
    batch: int = 1
    weights: str = "fp16"
    kv: str = "fp16"
    mixed: tuple[tuple[str, str], ...] = ()
    """(tensor group, precision) of groups that are kept at another precision than `weights`, each once."""
    draft: Draft | None = None
    """What proposes tokens for a step to verify, if anything."""

    def __post_init__(self) -> None:
        for name, flag in (("prompt_tokens", "--prompt"), ("new_tokens", "--new-tokens"), ("batch", "--batch")):
            value = getattr(self, name)
            if value < 1 or value > 10_000_000:
                raise SpecError(f"found {value}, expected a whole number from 1 to 10000000", key=flag)
        for name, flag, known in (("weights", "--weights", (*PRECISIONS, FILE)), ("kv", "--kv", PRECISIONS)):
            if getattr(self, name) not in known:
                raise SpecError(f"found {getattr(self, name)!r}, expected one of {', '.join(known)}", key=flag)
        if self.mixed and self.weights == FILE:
            raise SpecError("a file says itself in which precision each tensor is; name no others", key="--weights")
        groups = [group for group, _ in self.mixed]
        for group, precision in self.mixed:
            if precision not in PRECISIONS:
                raise SpecError(f"found {precision!r}, expected one of {', '.join(PRECISIONS)}",
                                key=f"--weights.{group}")
            if groups.count(group) > 1:
                raise SpecError("is named twice", key=f"--weights.{group}")

    def precision_of(self, group: str) -> str:
        """The precision that a tensor group is kept at."""
        return dict(self.mixed).get(group, self.weights)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Every precision that weights are kept at, the general one first."""
        return tuple(dict.fromkeys((self.weights, *(precision for _, precision in self.mixed))))

    @property
    def label(self) -> str:
        """The precision of the weights in words: "int4", or "bf16 (attention int4, experts int2)"."""
        return weights_label(self.weights, dict(self.mixed))

    def at(self, weights: str) -> Workload:
        """The same workload with weights at another precision."""
        return replace(self, weights=weights)

    def check(self, model: Model) -> None:
        """Raise SpecError where the context does not fit the model, or a precision is asked for what it has not."""
        limit = model.architecture.max_positions
        if self.prompt_tokens + self.new_tokens > limit:
            raise SpecError(f"a context of {self.prompt_tokens} + {self.new_tokens} tokens is past the "
                            f"{limit} that {model.name} has positions for", key="--prompt")
        known = [group.name for group in model.groups()]
        for group, _ in self.mixed:
            if group not in known:
                raise UnknownNameError(f"tensor group of {model.name}", group, known, key="--weights")
        if self.draft is not None:
            self.draft.check(model, self.context_tokens)

    # --- a decode step --------------------------------------------------------------------------

    @property
    def draft_length(self) -> int:
        """Tokens that are proposed for each sequence and step."""
        return self.draft.length if self.draft else 0

    @property
    def acceptance(self) -> float | None:
        """Chance that such a token is accepted; None where nothing is drafted."""
        return self.draft.acceptance if self.draft else None

    @property
    def step_tokens(self) -> int:
        """Tokens that pass through a layer together in a decode step: of each sequence one, and those to verify."""
        return self.batch * (1 + self.draft_length)

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens that a decode step yields for each sequence: what its seconds are divided by."""
        return self.draft.tokens_per_step if self.draft else 1.0

    @property
    def decode_steps(self) -> float:
        """Expected decode steps after the first token."""
        return (self.new_tokens - 1) / self.tokens_per_step

    @property
    def context_tokens(self) -> int:
        """Longest context. """
        return self.prompt_tokens + self.new_tokens

    @property
    def mean_decode_context(self) -> float:
        """Mean context over decode steps 2…N, the steps that `token_latency_s` averages."""
        return self.prompt_tokens + self.new_tokens / 2

    def mean_decode_window(self, window: int | None) -> float:
        """Mean over the same steps of what a layer that looks back `window` tokens attends to."""
        if window is None or self.new_tokens == 1:
            return min(self.mean_decode_context, window or self.mean_decode_context)
        return _mean_of_least(self.prompt_tokens + 1, self.context_tokens - 1, window)

    def mean_prompt_window(self, window: int | None) -> float:
        """Mean over the prompt's tokens of what a layer that looks back `window` tokens attends to, itself included."""
        return _mean_of_least(1, self.prompt_tokens, window or self.prompt_tokens)


def weights_label(weights: str, mixed: Mapping[str, str]) -> str:
    """A precision in words, with the tensor groups that are kept at another one."""
    own = ", ".join(f"{group} {precision}" for group, precision in mixed.items())
    return f"{weights} ({own})" if own else weights


def mixed_precisions(given: str | Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """(group, precision) pairs from a table, or from a text such as "attention=int4,experts=int2".

    Raises SpecError naming what is no such pair; `Workload` checks the precisions, `Workload.check` the groups.
    """
    if isinstance(given, str):
        pairs = [part.partition("=") for part in given.split(",")]
        for group, equals, precision in pairs:
            if not (group.strip() and equals and precision.strip()):
                raise SpecError(f"found {given!r}, expected pairs such as attention=int4,experts=int2",
                                key="--weights")
        return tuple((group.strip(), precision.strip()) for group, _, precision in pairs)
    return tuple((str(group), str(precision)) for group, precision in given.items())


def mixed_text(mixed: Mapping[str, object]) -> str:
    """Pairs as `mixed_precisions` reads them, e.g. "attention=int4,experts=int2"; empty for none."""
    return ",".join(f"{group}={precision}" for group, precision in mixed.items())


def _mean_of_least(first: int, last: int, limit: int) -> float:
    """Mean of min(c, limit) over the whole numbers c from `first` to `last`."""
    below = max(min(last, limit) - first + 1, 0)
    growing = below * (first + min(last, limit)) / 2
    return (growing + (last - first + 1 - below) * limit) / (last - first + 1)
