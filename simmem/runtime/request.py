"""What is to be captured, and does it make sense for this model?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypedDict

from simmem.errors import SpecError, UnknownNameError
from simmem.runtime.hooks import FITTED_CRITERIA, check_criterion
from simmem.runtime.measure import WINDOW_TOKENS
from simmem.runtime.models import LoadedModel
from simmem.runtime.pages import MASS_LEVELS
from simmem.runtime.passes import Passes

__all__ = ["MIN_TOKENS", "PREDICTORS", "UNITS", "Asked", "Request", "parse_levels"]

MIN_TOKENS = 8
"""Fewer have no cold start apart from a steady state, so no curves."""

DECODED_STEP_TOKENS = 128
"""Tokens that a decoded pass writes: what is lost at most when the run is stopped."""

UNITS = ("ffn-neuron", "expert", "kv-block")
SKIPS = ("neuron", "known")
PREDICTORS = ("gate", "low-rank")
_DEFAULT_RANK = 64
_DEFAULT_RECALL = 0.9
_DEFAULT_PREDICTOR_TOKENS = 16384
_DEFAULT_SPARSITY = 0.5
_DEFAULT_MASS = 0.95
_DEFAULT_PAGE_TOKENS = 16
_DEFAULT_LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9)
_MAX_LEVELS = 32


class Asked(TypedDict, total=False):
    """The fields of a `Request` as keyword arguments."""

    unit: str | None
    criterion: str | None
    sparsity: float | None
    skip: str | None
    mass: float | None
    page_tokens: int | None
    levels: Sequence[float] | None
    tokens: int
    context: int
    calibration_tokens: int
    evaluation_tokens: int
    batch: int
    observe: bool
    decode: bool
    temperature: float
    seed: int
    predictors: Sequence[str]
    rank: int | None
    recall: float | None
    predictor_tokens: int | None


@dataclass(frozen=True)
class Request:
    """What is captured; None takes what the model and the other fields suggest."""

    unit: str | None = None
    """One of `UNITS`; by default the expert where the model has some, else the FFN neuron."""
    criterion: str | None = None
    """FFN neurons: one of `simmem.runtime.hooks.CRITERIA`; by default wina."""
    sparsity: float | None = None
    """FFN neurons: share to leave out, in (0, 1); by default a half. Not for relu-zero, which needs none."""
    skip: str | None = None
    """FFN neurons: "known", a unit is what can be left unread once the criterion is known, the rest of the FFN being
    read whole; "neuron", all its rows and columns, which takes an oracle. By default known for gate and relu-zero."""
    mass: float | None = None
    """KV blocks: share of the attention mass that the active pages hold; by default 0.95."""
    page_tokens: int | None = None
    """KV blocks: tokens of one; by default 16."""
    levels: Sequence[float] | None = None
    """Perplexity is measured at these levels beside the one that is captured: of `sparsity`, or of `mass`. By default a
    few, where there is such a level; () measures no others."""
    tokens: int = 512
    """Recorded, of each sequence."""
    context: int = 512
    """Precede the first recorded token of a pass at least, and are not recorded but for their union."""
    calibration_tokens: int = 3072
    evaluation_tokens: int = 2048
    batch: int = 1
    """Sequences run side by side, each on its own stretch of the text."""
    observe: bool = False
    """Masks are read off the dense network, not off the one that runs without its inactive units. Perplexity is of the
    latter all the same."""
    decode: bool = False
    """The model writes the text itself, behind `context` tokens of the one given."""
    temperature: float = 0.0
    """Of a decoded text; 0 takes the likeliest token."""
    seed: int = 0
    predictors: Sequence[str] = ()
    """FFN neurons: those of `PREDICTORS` that are fitted on the calibration text and judged on what is recorded."""
    rank: int | None = None
    """Of a low-rank predictor; by default 64."""
    recall: float | None = None
    """Share of the active units that a predictor is to ask for; by default 0.9."""
    predictor_tokens: int | None = None
    """Tokens of the first third of the text that predictors are fitted on at most; by default 16384."""

    def check(self) -> None:
        """Raise SpecError or UnknownNameError where a field makes no sense for any model."""
        for key, known, value in (("unit", UNITS, self.unit), ("skip", SKIPS, self.skip)):
            if value is not None and value not in known:
                raise UnknownNameError(key, value, known, key=f"--{key}")
        if self.criterion is not None:
            check_criterion(self.criterion)
        if self.sparsity is not None and not 0.0 < self.sparsity < 1.0:  # also false for NaN
            raise SpecError(f"found {self.sparsity!r}, expected a share between 0 and 1, both excluded", key="sparsity")
        if self.mass is not None and not 0.0 < self.mass <= 1.0:
            raise SpecError(f"found {self.mass!r}, expected a share above 0 and at most 1", key="--mass")
        for level in self.levels or ():
            if not 0.0 < level <= 1.0:
                raise SpecError(f"found {level!r}, expected shares between 0 and 1", key="--levels")
        if len(self.levels or ()) > _MAX_LEVELS:
            raise SpecError(f"found {len(self.levels or ())}, expected at most {_MAX_LEVELS}", key="--levels")
        if not 0.0 <= self.temperature < float("inf"):
            raise SpecError(f"found {self.temperature!r}, expected 0 or more", key="--temperature")
        for key, number, least in (("tokens", self.tokens, MIN_TOKENS), ("context", self.context, int(self.decode)),
                                   ("calibration_tokens", self.calibration_tokens, 1),
                                   ("evaluation_tokens", self.evaluation_tokens, 2), ("batch", self.batch, 1),
                                   ("page_tokens", self.page_tokens, 1), ("seed", self.seed, 0),
                                   ("--rank", self.rank, 1), ("--predictor-tokens", self.predictor_tokens, 2)):
            if number is not None and number < least:
                raise SpecError(f"found {number}, expected at least {least}", key=key)
        for name in self.predictors:
            if name not in PREDICTORS:
                raise UnknownNameError("predictor", name, PREDICTORS, key="--predictor")
        if self.recall is not None and not 0.0 < self.recall <= 1.0:
            raise SpecError(f"found {self.recall!r}, expected a share above 0 and at most 1", key="--recall")
        if not self.predictors and any((self.rank, self.recall, self.predictor_tokens)):
            raise SpecError("is of a predictor: it goes with --predictor", key=next(
                key for key, value in (("--rank", self.rank), ("--recall", self.recall),
                                       ("--predictor-tokens", self.predictor_tokens)) if value))
        if (self.temperature or self.seed) and not self.decode:
            raise SpecError("is of a text that the model writes itself: it goes with --decode",
                            key="--temperature" if self.temperature else "--seed")

    def resolved(self, model: LoadedModel) -> Request:
        """Checked against a model, with every default that depends on it filled in.

        Raises SpecError where the model has no such units, or a field does not go with them.
        """
        self.check()
        unit = self.unit or ("expert" if model.experts else "ffn-neuron")
        neurons, pages = unit == "ffn-neuron", unit == "kv-block"
        for key, given, fits in (("--criterion", self.criterion, neurons), ("--sparsity", self.sparsity, neurons),
                                 ("--skip", self.skip, neurons), ("--mass", self.mass, pages),
                                 ("--page-tokens", self.page_tokens, pages),
                                 ("--predictor", self.predictors or None, neurons)):
            if given is not None and not fits:
                raise SpecError(f"does not go with the unit {unit}", key=key)
        if unit == "expert" and not model.experts:
            raise SpecError("has no mixtures of experts of a known kind", file=model.name, key="--unit")
        if neurons and not model.blocks:
            raise SpecError("has mixtures of experts; their unit is the expert, not the neuron", file=model.name,
                            key="--unit")
        found = replace(self, unit=unit)
        if neurons:
            criterion = self.criterion or "wina"
            if criterion == "relu-zero" and self.sparsity is not None:
                raise SpecError("relu-zero leaves out what is zero, however much that is", key="sparsity")
            known = criterion in ("gate", "relu-zero")
            sparsity = None if criterion == "relu-zero" else self.sparsity or _DEFAULT_SPARSITY
            found = replace(found, criterion=criterion, sparsity=sparsity,
                            skip=self.skip or ("known" if known else "neuron"))
            if "gate" in self.predictors and (found.skip == "known" or not model.gated or any(
                    block.activation is None for block in model.blocks)):
                raise SpecError("the gate predictor needs a gated FFN with an activation module, and units that are "
                                "whole neurons", file=model.name, key="--predictor")
            if self.predictors:
                found = replace(found, predictors=tuple(p for p in PREDICTORS if p in self.predictors),
                                rank=self.rank or _DEFAULT_RANK, recall=self.recall or _DEFAULT_RECALL,
                                predictor_tokens=self.predictor_tokens or _DEFAULT_PREDICTOR_TOKENS)
        if pages:
            page = self.page_tokens or _DEFAULT_PAGE_TOKENS
            found = replace(found, mass=self.mass or _DEFAULT_MASS, page_tokens=page)
            if self.batch != 1:
                raise SpecError("pages of several sequences are not the same ones: expected 1", key="--batch")
            if self.context % page:
                raise SpecError(f"found {self.context}, expected a multiple of the {page} tokens of a page",
                                key="context")
        if found.level is None and self.levels:
            raise SpecError(f"{found.criterion or unit} leaves out what costs nothing, at no level", key="--levels")
        if neurons and 1.0 in (self.levels or ()):
            raise SpecError("found 1.0, expected shares below 1: a network without any unit is none", key="--levels")
        usual = () if found.level is None else MASS_LEVELS if pages else _DEFAULT_LEVELS
        found = replace(found, levels=usual if self.levels is None else tuple(sorted(set(self.levels))))
        found.passes(model)
        return found

    @property
    def level(self) -> float | None:
        """The share that is left out, or of the mass that is kept; None where the units cost nothing to leave out."""
        return self.mass if self.unit == "kv-block" else self.sparsity

    @property
    def measured_levels(self) -> tuple[float, ...]:
        """Levels that perplexity is measured at, ascending: its own and the others."""
        return () if self.level is None else tuple(sorted({self.level, *(self.levels or ())}))

    def at(self, level: float) -> Request:
        """The same at another level."""
        return replace(self, mass=level) if self.unit == "kv-block" else replace(self, sparsity=level)

    @property
    def fitted(self) -> bool:
        """Is a threshold fitted on text?"""
        return self.criterion in FITTED_CRITERIA

    def top_k(self, model: LoadedModel) -> int | None:
        """Units that every token keeps, where it is a number of them that is kept."""
        if self.criterion != "top-k":
            return None
        return max(1, round((1.0 - (self.sparsity or _DEFAULT_SPARSITY)) * model.n_units))

    def passes(self, model: LoadedModel) -> Passes:
        """How the tokens are spread over passes. Raises SpecError where the context leaves no room in one."""
        window = min(WINDOW_TOKENS, model.max_positions)
        if self.context >= window:
            raise SpecError(f"found {self.context}, expected fewer than the {window} tokens of one pass", key="context")
        step = window - self.context
        if self.decode:
            step = min(step, DECODED_STEP_TOKENS)
        if self.page_tokens:  # so that pages begin where passes do
            if step < self.page_tokens:
                raise SpecError(f"found {self.page_tokens}, but a pass records {step} tokens", key="--page-tokens")
            step -= step % self.page_tokens
        return Passes(self.tokens, self.context, step, window)

    @property
    def mode(self) -> Literal["teacher-forced", "decoded"]:
        return "decoded" if self.decode else "teacher-forced"

    @property
    def label(self) -> str:
        """What the trace is called behind its model's name."""
        if self.unit == "expert":
            return "router"
        if self.unit == "kv-block":
            return f"kv-{100 * (self.mass or _DEFAULT_MASS):g}"
        return f"{self.criterion}" + ("" if self.sparsity is None else f"-{100 * self.sparsity:g}")

    def identity(self) -> dict[str, Any]:
        """The fields as plain data, as JSON gives them back."""
        return asdict(self) | {"levels": None if self.levels is None else list(self.levels),
                               "predictors": list(self.predictors)}


def parse_levels(texts: Sequence[str] | None) -> tuple[float, ...] | None:
    """Levels as they are given on the command line: "0.3,0.7", several of these, or "none".

    Raises SpecError where one is no number.
    """
    if not texts:
        return None
    words = [word.strip() for text in texts for word in text.split(",")]
    if words == ["none"]:
        return ()
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        raise SpecError(f"found {','.join(words)!r}, expected shares with commas between them, such as 0.3,0.7, or "
                        "none", key="--levels") from None
