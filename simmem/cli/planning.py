"""What is asked of the planner: `plan` and `simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmem.cli.options import Json, Plot
from simmem.errors import SpecError

__all__ = ["plan", "simulate"]


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


def plan(
    device: Annotated[str, typer.Option(help="Built-in name or TOML file (see `simmem devices`).")],
    model: Annotated[str, typer.Option(
        help="Built-in name, TOML file, Hugging Face config.json or folder, or GGUF file (see `simmem models`).")],
    dram: Annotated[str | None, typer.Option(help="DRAM budget: all the process may hold, e.g. 6.7GB.")] = None,
    vram: Annotated[str | None, typer.Option(help="GPU memory budget; an error on unified memory.")] = None,
    prompt: Annotated[int, typer.Option(help="Prompt tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to generate.")] = 256,
    batch: Annotated[int | None, typer.Option(
        help="Sequences decoded together; default: 1, or for --objective throughput the fewest within 3 % of the most "
             "tokens/s.")] = None,
    weights: Annotated[str | None, typer.Option(
        help="fp32 fp16 bf16 int8 int4 int3 int2, file: its own, or by tensor group: attention=int4,experts=int2; "
             "default: searched.")] = None,
    kv: Annotated[str, typer.Option(help="Precision of keys and values.")] = "fp16",
    trace: Annotated[str | None, typer.Option(help="Built-in name or file (see `simmem traces`).")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Only this policy; may be repeated.")] = None,
    settings: Annotated[list[str] | None, typer.Option(
        "--set", help="Hold a knob: KNOB=VALUE, bytes as in 10GB; repeatable.")] = None,
    objective: Annotated[str, typer.Option(help="latency, throughput, energy or memory.")] = "latency",
    engine: Annotated[str | None, typer.Option(help="Use what a named software stack achieves, where known.")] = None,
    draft: Annotated[str | None, typer.Option(
        help="A small model, named as --model, that drafts tokens for each step to verify; --set draft_length=N holds "
             "how many.")] = None,
    acceptance: Annotated[float | None, typer.Option(help="Share of drafted tokens that are accepted, 0 to 1.")] = None,
    max_quality_loss: Annotated[float | None, typer.Option(
        help="Largest rise of perplexity, e.g. 0.05; leaves out what nobody measured.")] = None,
    emit: Annotated[str | None, typer.Option(help="llama.cpp or accelerate: what makes it do the plan.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan there as JSON.")] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Find the best policy for a model on a device, and say what to expect of it."""
    from simmem.planner.api import answer
    from simmem.planner.drafts import at_draft, searches_lengths
    from simmem.planner.question import Question, ask

    knobs = _settings(settings)

    def at(sequences: int, length: int | None) -> Question:
        return ask(device, model, dram=dram, vram=vram, prompt=prompt, new_tokens=new_tokens, batch=sequences,
                   weights=weights, kv=kv, trace=trace, policy=policy or None, knobs=knobs,
                   objective=objective, engine=engine, max_quality_loss=max_quality_loss, draft=draft,
                   acceptance=acceptance, draft_length=length)

    question = at_draft(at, batch, objective, searched=searches_lengths(draft, knobs))
    if engine is not None:
        question.device.check_engine(engine)
    if emit is not None:
        from simmem.report.emit.engines import check_engine_name, emission, print_emission

        check_engine_name(emit)
    if out is not None:
        from simmem.report.files import check_writable, write_text

        check_writable(out, inputs=(device, model, draft, trace))
    if plot is not None:
        from simmem.report.plots.style import check_plot

        check_plot(plot, inputs=(device, model, draft, trace))
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
