"""The command line: parse, call, render. Heavy imports happen inside the commands that need them."""

from simmem.cli.main import main

__all__ = ["main"]
