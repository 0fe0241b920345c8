"""Which policies are there, and what does each do, without importing one?

A policy needs numpy and half of simmem; a list of names should not. So the names and summaries are read from the
source of the modules in `simmem.policy.families`, where every policy states them as plain class attributes (a test
compares this with the registry). Policies of other distributions can only be imported.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

__all__ = ["PolicyEntry", "policy_entries"]


@dataclass(frozen=True)
class PolicyEntry:
    """What a list says of a policy."""

    name: str
    summary: str
    uses_trace: bool


def policy_entries() -> list[PolicyEntry]:
    """Every policy that `simmem.policy.base.policies` knows, sorted by name."""
    found = _from_source(Path(__file__).with_name("families"))
    if not found or entry_points(group="simmem.policies"):  # installed without its sources, or with policies of others
        from simmem.policy.base import policies

        found = [PolicyEntry(p.name, p.summary, p.uses_trace) for p in policies().values()]
    return sorted(found, key=lambda entry: entry.name)


def _from_source(folder: Path) -> list[PolicyEntry]:
    found = []
    for path in sorted(folder.glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(d) == "register" for d in node.decorator_list):
                stated = {target.id: statement.value.value for statement in node.body
                          if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
                          for target in statement.targets if isinstance(target, ast.Name)}
                if not {"name", "summary", "uses_trace"} <= set(stated):
                    return []  # computed rather than stated: only an import tells
                found.append(PolicyEntry(str(stated["name"]), str(stated["summary"]), bool(stated["uses_trace"])))
    return found
