"""What are the parts of a model called in transformers, from the embedding to the head?

The names of transformers 5; a test compares them with the modules themselves, built without memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from simmem.spec.huggingface.families import FAMILIES
from simmem.spec.model import Model

__all__ = ["Modules", "modules_of"]


@dataclass(frozen=True)
class Modules:
    """Names of modules that together hold every parameter once."""

    layers: str
    """The list of layers; layer i is `layers`.i."""
    before: tuple[str, ...]
    after: tuple[str, ...]


_LLAMA = ("model", "layers", ("embed_tokens", "rotary_emb"), "norm")
_GPT2 = ("transformer", "h", ("wte", "wpe"), "ln_f")
_GPTJ = ("transformer", "h", ("wte",), "ln_f")
_MPT = ("transformer", "blocks", ("wte",), "norm_f")
_PHI = ("model", "layers", ("embed_tokens", "rotary_emb"), "final_layernorm")
_MAMBA = ("backbone", "layers", ("embeddings",), "norm_f")
_OTHERS = {
    "gpt2": _GPT2, "gpt_bigcode": _GPT2, "gptj": _GPTJ, "codegen": _GPTJ, "mpt": _MPT, "dbrx": _MPT,
    "phi": _PHI, "persimmon": _PHI, "mamba": _MAMBA, "falcon_mamba": _MAMBA,
    "gpt_neox": ("gpt_neox", "layers", ("embed_in", "rotary_emb"), "final_layer_norm"),
    "bloom": ("transformer", "h", ("word_embeddings", "word_embeddings_layernorm"), "ln_f"),
    "falcon": ("transformer", "h", ("word_embeddings", "rotary_emb"), "ln_f"),
    "opt": ("model.decoder", "layers", ("embed_tokens", "embed_positions"), "final_layer_norm"),
}
"""Family -> (what holds the layers, their name in it, what comes before them, the final norm)."""


def modules_of(model: Model) -> Modules | None:
    """The names of a model's modules; None for a family that is not known."""
    if model.family not in FAMILIES:
        return None
    root, layers, before, norm = _OTHERS.get(model.family, _LLAMA)
    a = model.architecture
    narrow = a.embedding_dim is not None and a.embedding_dim != a.d_model
    inside = (*before, *(("project_in", "project_out") if narrow else ()))
    after = ((f"{root}.{norm}",) if a.final_norm else ()) + ("lm_head",)
    return Modules(f"{root}.{layers}", tuple(f"{root}.{name}" for name in inside), after)
