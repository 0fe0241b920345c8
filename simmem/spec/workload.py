"""What is being asked of the model: how much text, how many sequences, at which precision?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from simmem.errors import SpecError
from simmem.spec.model import Model
from simmem.spec.precision import PRECISIONS

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
        for name, flag in (("weights", "--weights"), ("kv", "--kv")):
            if getattr(self, name) not in PRECISIONS:
                raise SpecError(f"found {getattr(self, name)!r}, expected one of {', '.join(PRECISIONS)}", key=flag)

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
