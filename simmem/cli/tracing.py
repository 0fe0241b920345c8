"""Traces: from real runs, from logs, through caches, out as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmem.cli.options import Json, Plot

__all__ = ["capture", "export", "import_log", "replay"]


def capture(
    model: Annotated[str, typer.Option(help="smollm2-135m, a model folder, a GGUF file or a Hugging Face id.")],
    out: Annotated[Path, typer.Option(help="Write the trace there (.safetensors).")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 prose; default: the shipped excerpt.")] = None,
    unit: Annotated[str | None, typer.Option(
        help="ffn-neuron, expert or kv-block; default: the expert where the model has some.")] = None,
    criterion: Annotated[str | None, typer.Option(
        help="FFN neurons: wina (default), magnitude, gate, relu-zero or top-k.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of FFN neurons to drop; default 0.5.")] = None,
    skip: Annotated[str | None, typer.Option(
        help="neuron: a unit is all its rows; known: what need not be read once the criterion is known.")] = None,
    mass: Annotated[float | None, typer.Option(help="KV blocks: share of the attention mass; default 0.95.")] = None,
    page_tokens: Annotated[int | None, typer.Option(help="KV blocks: tokens of one; default 16.")] = None,
    levels: Annotated[list[str] | None, typer.Option(
        help="Measure perplexity at these shares as well, e.g. 0.3,0.9; none: at no others; default: a few.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to record, of each sequence.")] = 512,
    context: Annotated[int, typer.Option(help="Tokens before the first recorded one of a pass.")] = 512,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens that thresholds are fitted on.")] = 3072,
    evaluation_tokens: Annotated[int, typer.Option(help="Tokens that perplexity is measured on.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences side by side, each on its own stretch of the text.")] = 1,
    observe: Annotated[bool, typer.Option("--observe", help="Read masks off the dense network.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Let the model write the text behind the context.")] = False,
    temperature: Annotated[float, typer.Option(help="With --decode; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="With --decode at a temperature.")] = 0,
    predictor: Annotated[list[str] | None, typer.Option(
        help="Fit and judge one: gate or low-rank; may be repeated.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of a low-rank predictor; default 64.")] = None,
    recall: Annotated[float | None, typer.Option(
        help="Share of the active units that a predictor is to ask for; default 0.9.")] = None,
    predictor_tokens: Annotated[int | None, typer.Option(
        help="Tokens that predictors are fitted on at most; default 16384.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads for torch.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch a Hugging Face id that is not cached.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with OUT.partial, which a stopped run left.")] = False,
    as_json: Json = False,
) -> None:
    """Record which units a real torch run touches, and what dropping the others costs."""
    import sys
    from dataclasses import replace

    from simmem.report.files import check_writable
    from simmem.runtime.capture import capture as run
    from simmem.runtime.capture import default_text_path
    from simmem.runtime.request import parse_levels
    from simmem.runtime.stream import discard, partial_folder
    from simmem.trace.store import save_trace

    check_writable(out, inputs=(text, *Path(model).glob("*.safetensors")), suffix=".safetensors")
    partial = partial_folder(out)
    found = run(model, text or default_text_path(), unit=unit, criterion=criterion, sparsity=sparsity, skip=skip,
                mass=mass, page_tokens=page_tokens, levels=parse_levels(levels), tokens=tokens, context=context,
                calibration_tokens=calibration_tokens, evaluation_tokens=evaluation_tokens, batch=batch,
                observe=observe, decode=decode, temperature=temperature, seed=seed,
                predictors=tuple(predictor or ()), rank=rank, recall=recall, predictor_tokens=predictor_tokens,
                dtype=dtype, device=device,
                threads=threads, download=download, partial=partial, resume=resume,
                progress=lambda what, share: print(f"{what} ({share:.0%})", file=sys.stderr))
    found = replace(found, header=found.header.model_copy(update={"name": out.stem}))  # the shipped ones keep theirs
    save_trace(found, out)
    discard(partial)
    if as_json:
        typer.echo(found.header.model_dump_json(by_alias=True, indent=2))
    else:
        from simmem.report.listing import print_trace

        print_trace(found.header, found.active_share)


def replay(
    trace: Annotated[str, typer.Argument(help="Built-in name or file.")],
    model: Annotated[str | None, typer.Option(help="Model whose shape a synthetic trace takes.")] = None,
    policy: Annotated[list[str] | None, typer.Option(
        help="window, lru, lfu, slru, pin-hot or belady; may be repeated; default: all.")] = None,
    size: Annotated[list[str] | None, typer.Option(
        help="Size of each layer's cache (with --global of the one), e.g. 2MB; may be repeated.")] = None,
    window: Annotated[list[int] | None, typer.Option(help="Window in tokens; may be repeated.")] = None,
    everywhere: Annotated[bool, typer.Option("--global", help="One cache for all layers.")] = False,
    batch: Annotated[int, typer.Option(help="Sequences decoded together: a step uses the union of theirs.")] = 1,
    page_cache: Annotated[str | None, typer.Option(help="Size of the system's page cache beneath, e.g. 500MB.")] = None,
    prefetch: Annotated[str | None, typer.Option(
        help="Read ahead: previous-token, frequent, RECALL:PRECISION (e.g. 0.9:0.6), or gate, low-rank or next-layer "
             "where the trace holds what they ask for.")] = None,
    weights: Annotated[str | None, typer.Option(help="Precision that units are stored at.")] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Which cache policy, and what size? Hits and bytes of cache policies on a trace, without running anything."""
    from simmem.report.replay import replay_answer

    if plot is not None:
        from simmem.report.plots.style import check_plot

        check_plot(plot, inputs=(trace, model))
    document = replay_answer(trace, model=model, policies=policy, sizes=size, windows=window, everywhere=everywhere,
                             batch=batch, page_cache=page_cache, prefetch=prefetch, weights=weights)
    if plot is not None:
        from simmem.report.plots.replay import plot_replay

        plot_replay(plot, document)
    if as_json:
        import json

        typer.echo(json.dumps(document, indent=2))
    else:
        from simmem.report.replay import print_replay

        print_replay(document)


def import_log(
    log: Annotated[Path, typer.Argument(help="JSON lines (.jsonl) or CSV (.csv), also with .gz.")],
    out: Annotated[Path, typer.Option(help="Write the trace there (.safetensors).")],
    columns: Annotated[list[str] | None, typer.Option(
        help="What the log calls token, layer and expert: token=tok_idx,layer=layer_id,expert=topk_ids.")] = None,
    model: Annotated[str | None, typer.Option(help="Model the log is of: its layers, experts and their bytes.")] = None,
    unit_bytes: Annotated[str | None, typer.Option(help="Without --model: bytes of one expert, e.g. 17.3MB.")] = None,
    n_experts: Annotated[int | None, typer.Option(help="Without --model: experts of a layer.")] = None,
    n_layers: Annotated[int | None, typer.Option(help="Without --model: layers with experts.")] = None,
    weights: Annotated[str | None, typer.Option(help="Precision of those bytes; default: the model's own.")] = None,
    unit: Annotated[str, typer.Option(help="expert or ffn-neuron.")] = "expert",
    sequence: Annotated[str | None, typer.Option(help="The field that tells sequences in one log apart.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only records with FIELD=VALUE; may be repeated.")] = None,
    first_expert: Annotated[int, typer.Option(help="What the log calls the first expert: 0 or 1.")] = 0,
    allow_missing: Annotated[bool, typer.Option(
        "--allow-missing", help="A layer without a record touches nothing; a token without any is left out.")] = False,
    text_note: Annotated[str, typer.Option(help="What was read or written when the log was made.")] = "unknown",
    as_json: Json = False,
) -> None:
    """Turn another program's routing log into a trace: which experts each token used in each layer."""
    from simmem.report.logs import import_answer, log_shape
    from simmem.trace.logs import layout_of

    shape = log_shape(model=model, unit=unit, unit_bytes=unit_bytes, n_units=n_experts, n_layers=n_layers,
                      weights=weights)
    layout = layout_of(columns or (), where or (), sequence=sequence, first_unit=first_expert,
                       allow_missing=allow_missing)
    found = import_answer(log, out, shape, layout, text=text_note, inputs=(model,))
    if as_json:
        typer.echo(found.header.model_dump_json(by_alias=True, indent=2))
    else:
        from simmem.report.listing import print_trace

        print_trace(found.header, found.active_share)


def export(
    trace: Annotated[str, typer.Argument(help="Built-in name or file.")],
    out: Annotated[Path, typer.Option(help="Write the table there (.parquet, .csv or .jsonl).")],
    model: Annotated[str | None, typer.Option(help="Model whose shape a synthetic trace takes.")] = None,
    as_json: Json = False,
) -> None:
    """Write a trace as a table for other tools: token, layer and unit, a row for each unit touched."""
    from simmem.report.logs import export_answer, print_export

    found, rows = export_answer(trace, out, model)
    if as_json:
        typer.echo(found.header.model_dump_json(by_alias=True, indent=2))
    else:
        print_export(found, rows, out)
