"""Which decoder does a Hugging Face `config.json` describe?

The file's `model_type` says which keys it has and what they mean (`families`). What is not known, is no
decoder, or has parts that an `Architecture` cannot describe, is refused: a count is exact or there is none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from simmem.spec.base import validate
from simmem.spec.huggingface.families import FAMILIES, WRAPPERS
from simmem.spec.huggingface.keys import MAX_CONFIG_BYTES, Keys
from simmem.spec.huggingface.quantized import file_bytes
from simmem.spec.jsonfile import read_json
from simmem.spec.model import Model

__all__ = ["model_from_config"]

_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_NOT_A_DECODER = re.compile(r"For(Sequence|Token|Image)Classification|ForQuestionAnswering|ForMaskedLM|RewardModel")


def model_from_config(path: Path) -> Model:
    """The model that a `config.json` describes, named after its folder (or the file, if that has another name).

    Of a model that sees as well as reads it is the decoder, and `title` says so. `source` says what was
    assumed or left out. Where a quantised checkpoint's layout follows from the configuration, `file_bytes`
    holds what its files do.

    Raises
    ------
    SpecError
        Naming file, key, what was found and what was expected: no JSON object of at most 16 MiB, a value of the
        wrong kind or size, a family that is not known, no decoder, or one that cannot be described exactly.
    """
    top = Keys(read_json(path, what="a configuration", max_bytes=MAX_CONFIG_BYTES), path)
    top.expect("is_encoder_decoder", False, None)
    for name in (top.words("architectures") or ()) if top.says("architectures") else ():
        if _NOT_A_DECODER.search(name):
            raise top.error("architectures", f"found {name[:60]!r}, expected a decoder that writes text")
    kind, decoder = _decoder(top)
    decoder.expect("per_layer_config", None)  # layers that differ from each other in any of the keys
    family = FAMILIES[kind]
    keys = decoder.of_family(family.defaults, family.spellings)
    notes = [] if decoder is top else ["the decoder under text_config; what sees is left out"]
    if any(keys.says(key) and keys.integer(key, least=0) for key in ("num_nextn_predict_layers", "num_mtp_layers")):
        notes.append("layers that predict further tokens are left out")
    precision = _precision(decoder) or _precision(top)
    if precision is None:
        notes.append("it states no dtype: fp16 is taken")
    name = _name(path)
    data: dict[str, Any] = {
        "schema": "simmem.model/1", "name": name, "title": name if decoder is top else f"{name}, its decoder",
        "family": kind, "native_precision": precision or "fp16", "architecture": family.shapes(keys)}
    model = validate(Model, data | {"source": str(path)}, file=str(path))
    quantised = next((one for one in (top, decoder) if one.says("quantization_config")), None)
    if quantised is not None:
        data["file_bytes"], note = file_bytes(model, quantised.nested("quantization_config"))
        notes.append(note)
    return validate(Model, data | {"source": "; ".join((str(path), *notes))}, file=str(path))


def _decoder(top: Keys) -> tuple[str, Keys]:
    """(its model_type, its keys): the file's own, or those under `text_config`."""
    kind = _model_type(top)
    if kind in FAMILIES:
        return kind, top
    if kind not in WRAPPERS:
        raise top.error("model_type", f"found '{kind}', expected a decoder that is known: "
                                      f"{', '.join(sorted({*FAMILIES, *WRAPPERS}))}")
    inner, expected = top.nested("text_config"), WRAPPERS[kind]
    if inner.says("model_type") and _model_type(inner) != expected:
        raise inner.error("model_type", f"found '{_model_type(inner)}', expected '{expected}' inside '{kind}'")
    return expected, inner.with_value("tie_word_embeddings", top) if top.says("tie_word_embeddings") else inner


def _model_type(keys: Keys) -> str:
    if not keys.says("model_type"):
        raise keys.error("model_type", "is missing: a Hugging Face configuration names its family there")
    return keys.word("model_type")


def _precision(keys: Keys) -> str | None:
    """fp32, fp16 or bf16; None where the file does not say."""
    for key in ("dtype", "torch_dtype"):
        if keys.says(key) and (word := keys.word(key)) != "auto":
            if word not in _DTYPES:
                raise keys.error(key, f"found '{word}', expected {', '.join(_DTYPES)}")
            return _DTYPES[word]
    return None


def _name(path: Path) -> str:
    """What a user would call it: the folder's name, or the hub's where it lies in the hub's own cache."""
    folder = path.resolve().parent
    if path.name != "config.json" or not folder.name:
        return path.stem
    cached = re.fullmatch(r"models--(?:.+--)?(.+)", folder.parent.parent.name)
    return cached[1] if cached and folder.parent.name == "snapshots" else folder.name
