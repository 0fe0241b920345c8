"""Which commands are there? Options as the contract says; each command calls one function and renders it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from simmem.errors import SpecError

__all__ = ["app", "capture", "command", "devices", "export", "import_log", "models", "plan", "policies", "replay",
           "reproduce", "schema", "simulate", "traces"]

app = typer.Typer(
    name="simmem", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Plan inference with models that do not fit in fast memory: what lives where, what moves when, how fast.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Plot = Annotated[Path | None, typer.Option(help="Draw it there: .png, .svg or .pdf (needs matplotlib).")]


def command() -> Any:
    """The command behind the app; its type is click's, or that of the copy of click which newer typers carry."""
    return typer.main.get_command(app)


def _version(asked: bool) -> None:
    if asked:
        from simmem import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show version.")] = False,
) -> None:
    del version


def _settings(pairs: list[str] | None) -> dict[str, object]:
    found: dict[str, object] = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign or not name or not value:
            raise SpecError(f"found {pair!r}, expected KNOB=VALUE", key="--set")
        if name in found:
            raise SpecError(f"the knob {name!r} is set twice", key="--set")
        found[name] = value
    return found


@app.command()
def plan(
    device: Annotated[str, typer.Option(help="Built-in name or TOML file (see `simmem devices`).")],
    model: Annotated[str, typer.Option(
        help="Built-in name, TOML file, Hugging Face config.json or folder, or GGUF file (see `simmem models`).")],
    dram: Annotated[str | None, typer.Option(help="DRAM budget: all the process may hold, e.g. 6.7GB.")] = None,
    vram: Annotated[str | None, typer.Option(help="GPU memory budget; an error on unified memory.")] = None,
    prompt: Annotated[int, typer.Option(help="Prompt tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to generate.")] = 256,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    weights: Annotated[str | None, typer.Option(
        help="fp32 fp16 bf16 int8 int4 int3 int2, or file: its own; default: searched.")] = None,
    kv: Annotated[str, typer.Option(help="Precision of keys and values.")] = "fp16",
    trace: Annotated[str | None, typer.Option(help="Built-in name or file (see `simmem traces`).")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Only this policy; may be repeated.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Hold a knob: KNOB=VALUE; repeatable.")] = None,
    objective: Annotated[str, typer.Option(help="latency, throughput, energy or memory.")] = "latency",
    engine: Annotated[str | None, typer.Option(help="Use what a named software stack achieves, where known.")] = None,
    max_quality_loss: Annotated[float | None, typer.Option(
        help="Largest rise of perplexity, e.g. 0.05; leaves out what nobody measured.")] = None,
    emit: Annotated[str | None, typer.Option(help="llama.cpp or accelerate: what makes it do the plan.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan there as JSON.")] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Find the best policy for a model on a device, and say what to expect of it."""
    from simmem.planner.api import answer
    from simmem.planner.question import ask

    question = ask(device, model, dram=dram, vram=vram, prompt=prompt, new_tokens=new_tokens, batch=batch,
                   weights=weights, kv=kv, trace=trace, policy=policy or None, knobs=_settings(settings),
                   objective=objective, engine=engine, max_quality_loss=max_quality_loss)
    if engine is not None:
        question.device.check_engine(engine)
    if emit is not None:
        from simmem.report.emit.engines import check_engine_name, emission, print_emission

        check_engine_name(emit)
    if out is not None:
        from simmem.report.files import check_writable, write_text

        check_writable(out, inputs=(device, model, trace))
    if plot is not None:
        from simmem.report.plots.style import check_plot

        check_plot(plot, inputs=(device, model, trace))
        if out is not None and out.resolve() == plot.resolve():
            raise SpecError("is also where --out goes; write to another file", file=str(plot), key="--plot")
    found = answer(question)
    if emit is not None:
        found = emission(found, question, emit)
    if out is not None:
        write_text(out, found.to_json() + "\n")
    if plot is not None:
        from simmem.report.plots.plan import plot_plan

        plot_plan(plot, found, question)
    if as_json:
        typer.echo(found.to_json())
    else:
        from simmem.report.plan import print_plan

        print_plan(found, question.device)
        if found.emit is not None:
            print_emission(found.emit)


@app.command()
def simulate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan written by `simmem plan --out`.")],
    tokens: Annotated[int, typer.Option(help="Trace tokens to run, 1 to 64.", min=1, max=64)] = 8,
    timeline: Annotated[Path | None, typer.Option(help="Write a Chrome/Perfetto trace there.")] = None,
    background: Annotated[list[str] | None, typer.Option(
        help="Load by other programs: RESOURCE=SHARE, e.g. memory.dram=0.3; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Run one plan through the event engine, token by token."""
    from simmem.planner.replan import read_plan, resimulate

    load = {}
    for pair in background or []:
        name, _, share = pair.partition("=")
        try:
            load[name] = float(share)
        except ValueError:
            raise SpecError(f"found {pair!r}, expected RESOURCE=SHARE", key="--background") from None
    if timeline is not None:
        from simmem.report.files import check_writable, write_text
        from simmem.report.perfetto import chrome_trace

        check_writable(timeline, inputs=(plan_file,))
    written = read_plan(plan_file)
    result, lines = resimulate(written, tokens, load, file=str(plan_file))
    if timeline is not None:
        write_text(timeline, chrome_trace(lines, f"{written.model} on {written.device}: {written.policy.name}"))
    if as_json:
        typer.echo(result.model_dump_json(by_alias=True, indent=2))
    else:
        from simmem.report.plan import print_simulation

        print_simulation(result)


@app.command()
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
    tokens: Annotated[int, typer.Option(help="Tokens to record, of each sequence.")] = 512,
    context: Annotated[int, typer.Option(help="Tokens before the first recorded one of a pass.")] = 512,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens that thresholds are fitted on.")] = 3072,
    evaluation_tokens: Annotated[int, typer.Option(help="Tokens that perplexity is measured on.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences side by side, each on its own stretch of the text.")] = 1,
    observe: Annotated[bool, typer.Option("--observe", help="Read masks off the dense network.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Let the model write the text behind the context.")] = False,
    temperature: Annotated[float, typer.Option(help="With --decode; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="With --decode at a temperature.")] = 0,
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
    from simmem.runtime.stream import discard, partial_folder
    from simmem.trace.store import save_trace

    check_writable(out, inputs=(text, *Path(model).glob("*.safetensors")), suffix=".safetensors")
    partial = partial_folder(out)
    found = run(model, text or default_text_path(), unit=unit, criterion=criterion, sparsity=sparsity, skip=skip,
                mass=mass, page_tokens=page_tokens, tokens=tokens, context=context,
                calibration_tokens=calibration_tokens, evaluation_tokens=evaluation_tokens, batch=batch,
                observe=observe, decode=decode, temperature=temperature, seed=seed, dtype=dtype, device=device,
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


@app.command()
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
        help="Read ahead: previous-token, frequent or RECALL:PRECISION, e.g. 0.9:0.6.")] = None,
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


@app.command("import")
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


@app.command()
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


@app.command()
def reproduce(
    name: Annotated[list[str] | None, typer.Argument(help="Built-in reference sets; default: all.")] = None,
    reference: Annotated[list[Path] | None, typer.Option(help="Your own rows (TOML); may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Compare published results with predictions; exit 1 where one is outside its tolerance."""
    from simmem.validation.reference import reproduce as run

    document = run(name or [], reference or [])
    if as_json:
        typer.echo(document.model_dump_json(by_alias=True, indent=2))
    else:
        from simmem.report.reference import print_reproduction

        print_reproduction(document)
    if document.failed:
        raise typer.Exit(1)


def _list(what: str, name: str | None, as_json: bool, plot: Path | None = None) -> None:
    from simmem.report.listing import list_names, show

    if plot is not None:
        from simmem.report.plots import draw

        draw(what, name, plot)
    if name is None:
        list_names(what, as_json)
    else:
        show(what, name, as_json)


Name = Annotated[str | None, typer.Argument(help="Show this one, with its sources.")]


@app.command()
def devices(
    name: Name = None,
    compare: Annotated[tuple[str, str] | None, typer.Option(
        metavar="A B", help="Show every figure of two devices side by side, and the ratio B/A.")] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """List devices, or show one with every figure, its kind and its source, or compare two."""
    if compare is not None:
        from simmem.report.compare import show_comparison

        show_comparison(*compare, beside=name or plot, as_json=as_json)
        return
    _list("device", name, as_json, plot)


@app.command()
def models(name: Name = None, as_json: Json = False) -> None:
    """List models, or show one with its parameters and bytes per tensor group."""
    _list("model", name, as_json)


@app.command()
def traces(name: Name = None, plot: Plot = None, as_json: Json = False) -> None:
    """List traces, or show one with its provenance and statistics."""
    _list("trace", name, as_json, plot)


@app.command()
def policies(name: Name = None, as_json: Json = False) -> None:
    """List policies, or show one with its knobs."""
    _list("policy", name, as_json)


@app.command()
def schema(name: Annotated[str | None, typer.Argument(help="plan, error, replay, reproduce, ...")] = None,
           as_json: Json = False) -> None:
    """Print the JSON schemas of every document, or of one."""
    del as_json  # it is JSON in any case
    from simmem.report.schema import print_schema

    print_schema(name)

