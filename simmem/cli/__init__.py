"""The command line: parse, call, render. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with the code of the contract."""
    try:
        from simmem.cli.run import run
    except KeyboardInterrupt:  # interrupted before anything could begin
        raise SystemExit(130) from None
    run(argv)
