"""What does the executor spend on a layer that has next to no weights, and how much more behind a pause?

The same code that runs a plan (`simmem.runtime.execute.kernels`), on decoders of the OPT and the Llama kind whose
matrices are too small to take time: what is left is what norms, positions, keys and values, and torch's calls take.
Behind a pause, as behind a read that a layer had to wait for, threads and caches have gone cold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from simmem.policy.layer_kinds import AROUND_KERNELS, FFN_KERNELS
from simmem.policy.layers import ATTENTION_KERNELS, HEAD_KERNELS
from simmem.runtime.execute.kernels import Decoder, rotary_tables, torch_dtype
from simmem.runtime.probe.agents import torch_threads
from simmem.runtime.probe.base import ALWAYS, Case, Run, Setting
from simmem.runtime.probe.watched import watched
from simmem.spec.model import Architecture, load_model

__all__ = ["PROBE", "cases"]

PROBE = "decoder-op"
DECODERS = ("opt-125m", "smollm2-135m")
PAUSES_S = (3e-3, 15e-3)
"""About what a layer waits for a read: of some MB, and of some tens of MB. [s]"""
_WIDTH, _HEADS, _D_HEAD, _VOCABULARY, _CONTEXT = 256, 4, 64, 512, 160


def cases(setting: Setting) -> list[Case]:
    """Attention, FFN and head back to back, and whole layers behind a pause."""
    found = []
    for name in DECODERS:
        a = load_model(name).architecture
        small = a.model_copy(update={
            "d_model": _WIDTH, "d_ff": _WIDTH, "n_heads": _HEADS, "d_head": _D_HEAD, "n_layers": 1,
            "n_kv_heads": _HEADS if a.n_kv_heads == a.n_heads else _HEADS // 2, "vocab": _VOCABULARY})
        kernels = {"attention": ATTENTION_KERNELS, "ffn": AROUND_KERNELS + FFN_KERNELS + (2 if a.gated else 0),
                   "head": HEAD_KERNELS}
        kernels["layer"] = kernels["attention"] + kernels["ffn"]
        for dtype in setting.dtypes or ("fp32", "bf16"):
            for op, n in kernels.items():
                setup, refuse = watched(setting.threads, partial(_op, small, dtype, op))
                found.append(_case(setting, name, dtype, op, n, 0.0, setup, refuse))
            found += [_case(setting, name, dtype, "layer", kernels["layer"], pause_s,
                            _paused(setting, small, dtype, pause_s), None) for pause_s in PAUSES_S]
    return found


def _case(setting: Setting, decoder: str, dtype: str, op: str, kernels: int, pause_s: float,
          setup: Callable[[], AbstractContextManager[Run]], refuse: Callable[[float], str | None] | None) -> Case:
    return Case(PROBE, {"agent": "cpu", "op": op, "decoder": decoder, "dtype": dtype, "threads": setting.threads,
                        "pause_s": pause_s}, setup, requests=float(kernels), priority=ALWAYS, refuse=refuse)


def _paused(setting: Setting, small: Architecture, dtype: str, pause_s: float
            ) -> Callable[[], AbstractContextManager[Run]]:
    @contextmanager
    def setup() -> Iterator[Run]:
        with torch_threads(setting.threads):
            step = _op(small, dtype, "layer")

            def run() -> float:
                time.sleep(pause_s)
                begun = time.perf_counter()
                step()
                return time.perf_counter() - begun

            yield run

    return setup


def _op(a: Architecture, dtype: str, op: str) -> Callable[[], object]:
    return _ops(a, dtype)[op]


def _ops(a: Architecture, dtype: str) -> dict[str, Callable[[], object]]:
    import torch

    of, cpu = torch_dtype(dtype), torch.device("cpu")
    decoder = Decoder(a, dtype, cpu, _CONTEXT,
                      rotary=None if a.learned_position_rows else rotary_tables(_CONTEXT, a.d_head))
    queries, keys, d = a.n_heads * a.d_head, a.n_kv_heads * a.d_head, a.d_model
    weights: dict[str, Any] = {f"{name}.weight": ((0, rows, torch.rand(rows, cols).to(of)),) for name, rows, cols in (
        ("q", queries, d), ("k", keys, d), ("v", keys, d), ("o", d, queries), ("gate", a.d_ff, d), ("up", a.d_ff, d),
        ("down", d, a.d_ff), ("head", a.vocab, d))}
    for name in ("attention_norm", "ffn_norm", "final_norm"):
        weights |= {f"{name}.weight": torch.ones(d, dtype=of), f"{name}.bias": torch.zeros(d, dtype=of)}
    if a.qkv_bias:
        weights |= {f"{n}.bias": torch.zeros(size, dtype=of) for n, size in (("q", queries), ("k", keys), ("v", keys))}
    if a.attention_output_bias:
        weights["o.bias"] = torch.zeros(d, dtype=of)
    if a.ffn_bias:
        weights |= {"up.bias": torch.zeros(a.d_ff, dtype=of), "gate.bias": torch.zeros(a.d_ff, dtype=of),
                    "down.bias": torch.zeros(d, dtype=of)}
    last = _CONTEXT - 1

    def attention() -> None:
        with torch.inference_mode():
            decoder.hidden.fill_(0.5)
            decoder.attend(0, weights, last)

    def ffn() -> None:
        with torch.inference_mode():
            decoder.hidden.fill_(0.5)
            decoder.feed(weights)

    def head() -> None:
        with torch.inference_mode():
            int(decoder.finish(weights, weights))

    def layer() -> None:
        attention()
        ffn()

    return {"attention": attention, "ffn": ffn, "head": head, "layer": layer}
