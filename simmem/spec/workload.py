"""What is being asked of the model: how much text, how many sequences, at which precision?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from simmem.errors import SpecError
from simmem.spec.model import Model
from simmem.spec.precision import FILE, PRECISIONS

__all__ = ["Workload"]


@dataclass(frozen=True)
class Workload:
    """Tokens in and out, sequences decoded together, precisions of weights and of keys and values."""

    prompt_tokens: int = 128
    new_tokens: int = 256
    batch: int = 1
    weights: str = "fp16"
    kv: str = "fp16"

    def __post_init__(self) -> None:
        for name, flag in (("prompt_tokens", "--prompt"), ("new_tokens", "--new-tokens"), ("batch", "--batch")):
            value = getattr(self, name)
            if value < 1 or value > 10_000_000:
                raise SpecError(f"found {value}, expected a whole number from 1 to 10000000", key=flag)
        for name, flag, known in (("weights", "--weights", (*PRECISIONS, FILE)), ("kv", "--kv", PRECISIONS)):
            if getattr(self, name) not in known:
                raise SpecError(f"found {getattr(self, name)!r}, expected one of {', '.join(known)}", key=flag)

    def at(self, weights: str) -> Workload:
        """The same workload with weights at another precision."""
        return replace(self, weights=weights)

    def check(self, model: Model) -> None:
        """Raise SpecError where the context does not fit the model."""
        limit = model.architecture.max_positions
        if self.prompt_tokens + self.new_tokens > limit:
            raise SpecError(f"a context of {self.prompt_tokens} + {self.new_tokens} tokens is past the "
                            f"{limit} that {model.name} has positions for", key="--prompt")

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


def _mean_of_least(first: int, last: int, limit: int) -> float:
    """Mean of min(c, limit) over the whole numbers c from `first` to `last`."""
    below = max(min(last, limit) - first + 1, 0)
    growing = below * (first + min(last, limit)) / 2
    return (growing + (last - first + 1 - below) * limit) / (last - first + 1)
