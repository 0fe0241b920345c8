"""Is the package built as `docs/design.md` says: one-way imports, small modules, one home for units, light start-up?"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "simmem"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 450

# Not needed to parse a command line or to list what there is.
HEAVY = ("matplotlib", "networkx", "numpy", "pandas", "pint", "pydantic", "safetensors", "scipy", "simpy", "sklearn",
         "torch", "transformers")
# In the extras, or in none: a plan is made without them.
OPTIONAL = ("distributed", "gguf", "joblib", "matplotlib", "pandas", "pint", "scipy", "simpy", "sklearn", "torch",
            "transformers")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def each_module(paths: list[Path] = MODULES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=dotted)


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, where nothing is imported yet."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          check=False)


def test_imports_point_one_way() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_no_module_has_outgrown_one_question() -> None:
    lines = {dotted(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert len(lines) > 20
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


def prefixes_written_out(path: Path) -> list[str]:
    """Where a module writes 1e6, 1e9, 2**30 or a factor of 1024 out rather than convert through `simmem.units`.

    1024 by itself may be a count (of threads, of tokens); as a factor or divisor it is a prefix.
    """
    decimal, binary = {1e6, 1e9, 1e12}, {2**10, 2**20, 2**30, 2**40}
    found = []
    for node in ast.walk(tree(path)):
        match node:
            case ast.Constant(value=float(value)):
                written_out = value in decimal | binary
            case ast.BinOp(left=ast.Constant(value=base), op=ast.Pow(), right=ast.Constant(value=exponent)):
                written_out = base**exponent in decimal | binary
            case ast.BinOp(op=ast.Mult() | ast.Div() | ast.FloorDiv()) | ast.AugAssign(
                op=ast.Mult() | ast.Div() | ast.FloorDiv()
            ):
                sides = [node.value] if isinstance(node, ast.AugAssign) else [node.left, node.right]
                written_out = any(isinstance(side, ast.Constant) and side.value in decimal | binary for side in sides)
            case _:
                continue
        if written_out:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_units_are_converted_in_one_place() -> None:
    # units.py on the way in, report/ on the way out.
    elsewhere = [path for path in MODULES if path != PACKAGE / "units.py" and PACKAGE / "report" not in path.parents]
    assert [line for path in elsewhere for line in prefixes_written_out(path)] == []
    assert prefixes_written_out(PACKAGE / "units.py"), "the check finds nothing where there is something to find"


@each_module()
def test_all_lists_exactly_the_public_names(path: Path) -> None:
    module = importlib.import_module(dotted(path))
    listed = getattr(module, "__all__", None)
    if listed is None:
        assert path.name == "__init__.py" or path.stem.startswith("_"), "a module says what it offers in __all__"
        return
    assert sorted(set(listed)) == sorted(listed)
    missing = [name for name in listed if not hasattr(module, name)]
    assert missing == []
    home = module.__name__
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == home
    }
    assert public - set(listed) == set(), "public functions and classes that __all__ does not list"


def test_no_submodule_is_named_like_a_public_function() -> None:
    simmem = importlib.import_module("simmem")
    functions = {name for name in simmem.__all__ if callable(getattr(simmem, name))}
    submodules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert functions
    assert functions & submodules == set()


@cache
def distributions_by_module() -> dict[str, list[str]]:
    return dict(packages_distributions())


def imported_distributions(path: Path) -> set[str]:
    """Distributions, in normal form, whose modules `path` imports anywhere."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    owners = distributions_by_module()
    third_party = names - sys.stdlib_module_names - {"simmem"}
    return {owners.get(name, [name])[0].lower().replace("_", "-") for name in third_party}


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_.-]", text, maxsplit=1)[0].lower().replace("_", "-") for text in requirements}


def test_imports_and_requirements_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    always = declared(project["dependencies"])
    extras = project["optional-dependencies"]
    optional = declared([text for name in extras.keys() - {"test", "dev"} for text in extras[name]])
    used = {dotted(path): imported_distributions(path) for path in MODULES}
    undeclared = {name: sorted(found - always - optional) for name, found in used.items()}
    assert {name: found for name, found in undeclared.items() if found} == {}
    assert always - set().union(*used.values()) == set(), "required, but nothing imports it"


def test_help_imports_nothing_heavy() -> None:
    done = python(
        "import sys\n"
        "from simmem.cli import main\n"
        "sys.argv = ['simmem', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "plan" in done.stdout
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_plan_needs_no_optional_package() -> None:
    done = python(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {OPTIONAL}:\n"
        "            raise ModuleNotFoundError('not installed: ' + name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from simmem.cli import main\n"
        "sys.argv = ['simmem', 'plan', '--device', 'iphone15', '--model', 'opt-6.7b', '--json']\n"
        "main()\n"
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["schema"] == "simmem.plan/1"
    assert plan["feasible"] is True
