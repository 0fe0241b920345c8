"""A decoder whose tokens choose two of eight experts: which do they choose, and does the next token choose them again?

Mixtral's shape (transformers' `MixtralForCausalLM`), trained from nothing with the load-balancing loss of the Switch
Transformer (arXiv 2101.03961, equations 4 to 6), taken layer by layer: over all layers together, as transformers
takes it, one layer's load can make up for another's. A workload with a real structure, not a good language model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from training import Size, arguments, prepare, save, structure, token_ids, train, versions

__all__ = ["EXPERTS", "PER_TOKEN", "SIZES", "balance_loss", "main", "network_of"]

EXPERTS, PER_TOKEN = 8, 2
# Named as Mixtral is: experts x parameters of the same decoder with one expert.
SIZES = {
    "tiny": Size("moe-tiny", 2, 32, 2, 32, 300, 64, steps=30, batch=4, rate=1e-2),
    "small": Size("moe-8x3m", 4, 256, 4, 384, 4096, 1024, steps=700, batch=2, rate=2e-3),
    "large": Size("moe-8x25m", 8, 512, 8, 1024, 8192, 1024, steps=1500, batch=16, rate=1e-3),
}


def network_of(size: Size) -> Any:
    """Random weights."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=size.vocab, hidden_size=size.d_model, intermediate_size=size.width, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads // 2, max_position_embeddings=size.positions,
        num_local_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, output_router_logits=True, sliding_window=None,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=None))


def balance_loss(router_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Experts times the sum of (share of tokens) x (mean probability), mean over layers; 2, the experts a token has,
    when the load is even."""
    layers = []
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(PER_TOKEN, dim=-1).indices, 1.0)
        layers.append(EXPERTS * (chosen.mean(dim=0) * probabilities.mean(dim=0)).sum())
    return torch.stack(layers).mean()


def chosen_experts(output: Any) -> NDArray[np.bool_]:
    """(tokens, layers, experts)."""
    logits = torch.stack(list(output.router_logits), dim=1)
    return torch.zeros_like(logits).scatter_(2, logits.topk(PER_TOKEN, dim=-1).indices, 1.0).bool().numpy()


def main(arguments_given: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(str(__doc__).splitlines()[0], SIZES)
    parser.add_argument("--balance", type=float, default=0.02, help="weight of the load-balancing loss")
    options = parser.parse_args(arguments_given)
    size = SIZES[options.size]
    corpus, tokenizer = prepare(options, size)
    network = network_of(size)
    training = train(network, token_ids(tokenizer, corpus.training), size, options,
                     lambda output: options.balance * balance_loss(output.router_logits))
    figures = structure(network, tokenizer, corpus.sources, size.positions, chosen_experts)
    network.config.output_router_logits = False  # it asks for the loss of training; a later run has no use for it
    record = {
        "name": size.name, "seed": options.seed, "threads": options.threads, "device": options.device,
        "balance": options.balance, "versions": versions(), "parameters": network.num_parameters(),
        "training": training,
        "load_by_layer": (figures["frequencies"] / PER_TOKEN).tolist(),
        **{key: figures[key] for key in ("held_out", "tokens", "stretch", "windows", "windows_by_layer")},
        "text": [source.provenance() for source in corpus.sources],
    }
    save(network, tokenizer, record, options.out)
    return record


def report(record: dict[str, Any]) -> None:
    for name, found in record["held_out"].items():
        print(f"{name}: perplexity {found['perplexity']:.1f}, {found['bits_per_byte']:.2f} bits a byte")
    print(f"layer: share of the load by expert (even: {1 / EXPERTS:.3f}); chosen by the token before too (independent)")
    for layer, (load, rows) in enumerate(zip(record["load_by_layer"], record["windows_by_layer"], strict=True)):
        print(f"  {layer}: " + " ".join(f"{share:.3f}" for share in load)
              + f"; {1 - rows[0]['new']:.3f} ({1 - rows[0]['new_independent']:.3f})")
    print("tokens: union of their experts (independent), chosen again after them (independent)")
    for row in record["windows"]:
        print(f"  {row['tokens']}: {row['union']:.3f} ({row['union_independent']:.3f}), "
              f"{1 - row['new']:.3f} ({1 - row['new_independent']:.3f})")


if __name__ == "__main__":
    report(main(sys.argv[1:]))
