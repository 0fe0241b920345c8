"""How does a command end? One document or one clear line, and the exit code of the contract."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from simmem.errors import MachineError, SimmemError

__all__ = ["run"]

INTERNAL_ERROR = 70
INTERRUPTED = 130

# The base of every error in the use of options: click's, or that of the copy of click which newer typers carry inside.
# Neither exports it, and click itself need not be installed.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def run(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with the code of the contract."""
    _prepare_streams()
    _stop_like_interrupt()
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    as_json = "--json" in arguments
    code: int
    try:
        from simmem.cli.app import command

        # Not its main(), which has exit codes and messages of its own for interruptions and closed pipes.
        parsed = command()
        with parsed.make_context("simmem", arguments) as context:
            parsed.invoke(context)
        sys.stdout.flush()
        code = 0
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("simmem: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except _USAGE_ERROR as error:
        code = _fail(_usage_problem(error), "SpecError", as_json)
    except SimmemError as error:
        code = _fail(error, type(error).__name__, as_json)
    except BrokenPipeError:  # the reader of our output went away, which is its business
        _drop_stdout()
        code = 0
    except MemoryError:
        code = _fail(MachineError("out of memory"), "MachineError", as_json)
    except OSError as error:
        _drop_stdout()  # a full disk would fail once more when the interpreter flushes
        code = _fail(MachineError(str(error.strerror or error), file=_name(error)), "MachineError", as_json)
    except Exception as error:  # noqa: BLE001 - a bug: it keeps its traceback and has an exit code of its own
        traceback.print_exc()
        code = INTERNAL_ERROR
        if as_json:
            _print_error("InternalError", SimmemError(f"{type(error).__name__}: {error}"))
    sys.exit(code)


def _stop_like_interrupt() -> None:
    """A request to stop ends a command as Ctrl-C does: files and threads are put away."""
    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # asked once is enough: what is being put away is put away
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # only the main thread may ask for signals
        signal.signal(signal.SIGTERM, stop)


def _prepare_streams() -> None:
    """Make standard output take any text, whole: another encoding, no buffer, or closed altogether."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - lives as long as the process
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    raw = getattr(sys.stdout, "buffer", None)
    if isinstance(raw, io.FileIO):  # PYTHONUNBUFFERED: a raw file may take part of a text and not say so
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding=sys.stdout.encoding)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _drop_stdout() -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_problem(error: Any) -> SimmemError:
    """What is wrong with the options, with the option as the key where one is to blame."""
    see = f"(see {getattr(getattr(error, 'ctx', None), 'command_path', 'simmem')} --help)"
    option, name = getattr(error, "param", None), getattr(error, "option_name", None)
    what = type(error).__name__
    if option is not None:
        name = option.opts[-1] if option.opts[-1].startswith("-") else option.metavar or option.name
        if what == "MissingParameter":
            return SimmemError(f"is required {see}", key=name)
        problems: list[Any] = getattr(error.__cause__, "errors", list)()  # of pydantic, which newer typers convert with
        found = f"found {problems[0]['input']!r}: " if problems else ""
        return SimmemError(f"{found}{error.message} {see}", key=name)
    if what == "NoSuchOption":
        close = f", did you mean {' or '.join(sorted(error.possibilities))}?" if error.possibilities else ""
        return SimmemError(f"no such option{close} {see}", key=name)
    if what == "BadOptionUsage":
        return SimmemError(f"{error.message.removeprefix(f'Option {name!r} ').rstrip('.')} {see}", key=name)
    return SimmemError(f"{error.format_message().rstrip('.')} {see}")


def _name(error: OSError) -> str | None:
    return str(error.filename) if error.filename is not None else None


def _fail(error: SimmemError, kind: str, as_json: bool) -> int:
    if as_json and error.exit_code != 1:
        with contextlib.suppress(OSError):
            _print_error(kind, error)
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))  # one line, whatever a name holds
    print(f"simmem: {line}", file=sys.stderr)
    return error.exit_code


def _print_error(kind: str, error: SimmemError) -> None:
    print(json.dumps({"schema": "simmem.error/1", "kind": kind, "message": error.message, "file": error.file,
                      "key": error.key, "tier": error.tier, "missing_bytes": error.missing_bytes}))
