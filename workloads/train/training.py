"""How is a small language model trained, judged on text it never saw, and saved?

What the two recipes share: a byte-level BPE tokenizer of the training text, random windows, AdamW, a cosine, and a
Hugging Face folder. Figures are those of the saved weights, fp16 widened to fp32. A run on the CPU repeats bit for bit
with the same versions, seed and number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from corpus import Corpus, Source, read_corpus
from numpy.typing import NDArray

__all__ = [
    "WINDOWS", "Size", "arguments", "next_token_loss", "prepare", "recorded_inputs", "save", "structure", "token_ids",
    "train", "versions", "windows",
]

_END = "<|endoftext|>"
WINDOWS = (1, 2, 3, 4, 5, 6, 8, 10, 16)
_EVALUATED = 64
_TRACED = 8
_PARTS = 4
"""Windows are this many times shorter, and as many times more, in the first half: cheaper and more varied steps."""
_WARM_UP = 0.05
_LAST_RATE = 0.1
_CLIP = 1.0


@dataclass(frozen=True)
class Size:
    """A setting: the network's shapes, and how it is trained unless the command line says otherwise."""

    name: str
    layers: int
    d_model: int
    heads: int
    width: int
    vocab: int
    positions: int
    steps: int
    batch: int
    rate: float


def arguments(about: str, sizes: dict[str, Size]) -> argparse.ArgumentParser:
    """The options that both recipes have."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--packages", type=Path, help="folder with the downloaded texts (README.md); without it, "
                        "Python's own reference is all there is")
    parser.add_argument("--size", choices=sorted(sizes), default="small")
    parser.add_argument("--steps", type=_positive)
    parser.add_argument("--batch", type=_positive, help="windows a step")
    parser.add_argument("--rate", type=float, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=_positive, default=1)
    parser.add_argument("--device", default="cpu")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected 1 or more")
    return number


def prepare(options: argparse.Namespace, size: Size) -> tuple[Corpus, Any]:
    """Seed and threads set; the text, and a tokenizer trained on the part that is for training."""
    if options.out.exists():
        sys.exit(f"{options.out}: exists already")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    if not options.device.startswith("cpu"):  # as far as a GPU's operators allow; the CPU's are
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        corpus = read_corpus(options.packages)
    except FileNotFoundError as error:
        sys.exit(str(error))
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.train_from_iterator(corpus.training, tokenizers.trainers.BpeTrainer(
        vocab_size=size.vocab, special_tokens=[_END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=_END, bos_token=_END, unk_token=_END, model_max_length=size.positions)
    return corpus, tokenizer


def token_ids(tokenizer: Any, texts: list[str] | tuple[str, ...]) -> NDArray[np.int64]:
    """The documents one after another, each ended."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return np.array([token for document in encoded for token in (*document, tokenizer.eos_token_id)], np.int64)


def train(network: Any, ids: NDArray[np.int64], size: Size, options: argparse.Namespace,
          penalty: Callable[[Any], torch.Tensor]) -> dict[str, Any]:
    """Minimise the next-token loss plus `penalty(output)`, round the weights to fp16; what was run, and the losses."""
    steps, batch, rate = options.steps or size.steps, options.batch or size.batch, options.rate or size.rate
    network.to(options.device).train()
    decayed = [p for p in network.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                                   {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0}],
                                  lr=rate, betas=(0.9, 0.95))
    random = np.random.default_rng(options.seed)
    losses: list[list[float]] = []
    recent: list[float] = []
    started, cpu_started = time.monotonic(), time.process_time()
    for step in range(steps):
        warmth = min(1.0, (step + 1) / max(1, _WARM_UP * steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * warmth * (_LAST_RATE + (1 - _LAST_RATE) * cosine)
        parts = _PARTS if step < steps // 2 else 1
        length = size.positions // parts
        starts = random.integers(0, ids.size - length - 1, batch * parts)
        rows = torch.from_numpy(np.stack([ids[at:at + length + 1] for at in starts])).to(options.device)
        with torch.autocast(options.device.split(":")[0], torch.bfloat16):
            output = network(input_ids=rows[:, :-1], use_cache=False)
            loss = next_token_loss(output.logits, rows)
            total = loss + penalty(output)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
        optimizer.step()
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            sys.exit(f"the loss is {recent[-1]} at step {step + 1}; a lower --rate may help")
        if (step + 1) % max(1, steps // 40) == 0 or step + 1 == steps:
            losses.append([step + 1, round(float(np.mean(recent)), 4)])
            recent.clear()
            print(f"step {step + 1} of {steps}: loss {losses[-1][1]:.3f} nats, "
                  f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    with torch.no_grad():  # what is judged is what is saved; `half()` would round rotary frequencies too
        for parameter in network.parameters():
            parameter.copy_(parameter.half())
    return {"steps": steps, "batch": batch, "highest_rate": rate, "tokens": steps * batch * size.positions,
            "training_tokens": int(ids.size), "losses": losses,
            "minutes": round((time.monotonic() - started) / 60, 1),
            "cpu_minutes": round((time.process_time() - cpu_started) / 60, 1)}


def next_token_loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean nats a token; `rows` are one token longer than the logits."""
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@contextmanager
def recorded_inputs(modules: list[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The input of each module in its latest pass, in the order in which they ran."""
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module is modules[0]:
            kept.clear()
        kept.append(inputs[0])

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def structure(network: Any, tokenizer: Any, sources: tuple[Source, ...], positions: int,
              used: Callable[[Any], NDArray[np.bool_]]) -> dict[str, Any]:
    """Loss on the held-out text, and which units it uses.

    Parameters
    ----------
    used : from a pass's output to what each of its tokens used, shape (tokens, layers, units).

    Returns
    -------
    held_out : by source, the tokens predicted (at most 64 windows), loss in nats a token, perplexity, bits a byte.
    share : of the units that a token uses, by layer; `unused` the units that no held-out token used.
    windows : of a consecutive stretch of *Persuasion*: `union` (share of the units used in k tokens), `new` (share of a
        token's units that the k before did not use), `new_share` (the same as a share of all units), and what units
        that fire as often, independently, would give. `stretch` is its tokens. The same by layer.
    frequencies : of each unit, (layers, units).
    """
    network.float().to("cpu").eval()
    held_out: dict[str, Any] = {}
    uses, tokens = np.zeros(()), 0
    stretch: list[NDArray[np.bool_]] = []
    for source in sources:
        if not source.held_out:
            continue
        ids = token_ids(tokenizer, source.held_out)
        nats = count = 0
        for at in range(0, ids.size - positions, positions)[:_EVALUATED]:
            rows = torch.from_numpy(ids[None, at:at + positions + 1])
            with torch.no_grad():
                output = network(input_ids=rows[:, :-1], use_cache=False)
                nats += float(next_token_loss(output.logits, rows)) * positions
            count += positions
            active = used(output)
            uses, tokens = uses + active.sum(axis=0), tokens + positions
            if source.name == "Persuasion" and len(stretch) < _TRACED:
                stretch.append(active)
        if count:
            text_bytes = len(tokenizer.decode(ids[1:count + 1], skip_special_tokens=True).encode())
            held_out[source.name] = {
                "tokens": count, "loss_nats": nats / count, "perplexity": math.exp(nats / count),
                "bits_per_byte": nats / count / math.log(2) * count / text_bytes}
    frequencies, traced = uses / tokens, np.concatenate(stretch)
    return {"held_out": held_out, "tokens": tokens, "share": frequencies.mean(axis=1).tolist(),
            "unused": (uses == 0).mean(axis=1).tolist(), "stretch": len(stretch) * positions,
            "windows": windows(traced), "frequencies": frequencies,
            "windows_by_layer": [windows(traced[:, [layer]]) for layer in range(traced.shape[1])]}


def windows(active: NDArray[np.bool_], lengths: tuple[int, ...] = WINDOWS) -> list[dict[str, float]]:
    """What k consecutive tokens use together, and what the next one adds; `active` is (tokens, layers, units).

    Every figure is over the same tokens, those that `max(lengths)` others precede. The independent figures are
    1 - (1 - f)^k for a unit that fires on a share f of the tokens.
    """
    longest = max(lengths)
    last = np.full(active.shape[1:], -longest - 1)
    held, new = np.zeros(longest + 1), np.zeros(longest + 1)
    counted = uses = 0
    for token, row in enumerate(active):
        ages = np.bincount(np.minimum(token - last, longest + 1)[row], minlength=longest + 2)
        last[row] = token
        if token >= longest:
            counted += 1
            uses += int(row.sum())
            new += ages[::-1].cumsum()[::-1][1:]  # not used by the k before: used k + 1 tokens ago or earlier
            held += np.bincount(np.minimum(token - last, longest).ravel(), minlength=longest + 1).cumsum()
    f = active.mean(axis=0, dtype=np.float64)
    size, fires = f.size, max(f.sum(), np.finfo(np.float64).tiny)
    return [{
        "tokens": k,
        "union": held[k - 1] / counted / size,
        "union_independent": float(1 - ((1 - f) ** k).mean()),
        "new": new[k] / max(uses, 1),
        "new_independent": float((f * (1 - f) ** k).sum() / fires),
        "new_share": new[k] / counted / size,
    } for k in lengths if k < len(active)]


def save(network: Any, tokenizer: Any, record: dict[str, Any], out: Path) -> None:
    """Write a Hugging Face folder with `figures.json` beside, whole or not at all."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        network.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "figures.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
        folder.chmod(0o755)
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0]} | {
        module.__name__: module.__version__ for module in (torch, transformers, tokenizers, np)}
