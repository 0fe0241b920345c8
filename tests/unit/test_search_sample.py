"""Does a sample fill a space evenly and the same each time, and does refinement close in on what it is asked for?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import qmc

from simmem.errors import MachineError, SpecError
from simmem.planner.grid import refine as refine_module
from simmem.planner.grid.ranges import CountRange, NumberRange, SizeRange
from simmem.planner.grid.refine import NEAREST, Refinement
from simmem.planner.grid.sample import Space, sobol_points
from simmem.planner.grid.spec import Cell, load_search

SPEC = """schema = "simmem.search-spec/1"
[[grid]]
devices = ["iphone15", "m1-max"]
models = ["opt-125m"]
workloads = [{ prompt_tokens = 16, new_tokens = 4, weights = "fp16" }]
budgets = [{ dram = { from = "1 GB", to = "4 GB" } }]
sample = { cells = 8, refine = 24 }
"""


def cells_of(tmp_path: Path, text: str) -> list[Cell]:
    (tmp_path / "s.toml").write_text(text)
    return load_search(tmp_path / "s.toml")[1]


# --- the sample ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 90), st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 99))
def test_every_entry_of_a_list_is_dealt_as_often_as_any_other(n: int, sizes: list[int], seed: int) -> None:
    """Of parts in all points, of axes in the points with their entry."""
    space = Space({"devices": [{}] * sizes[0],
                   "workloads": [{"new_tokens": tuple(range(size)), "dram": SizeRange.model_validate(
                       {"from": "1 GB", "to": "9 GB"})} for size in sizes]})
    points = sobol_points(space, n, seed)
    assert points == sobol_points(space, n, seed) and len(points) == n
    groups = [(Counter(p.entries[part] for p in points), many, n) for part, many in enumerate((sizes[0], len(sizes)))]
    for entry, size in enumerate(sizes):
        mine = [p for p in points if p.entries[1] == entry]
        groups.append((Counter(p.at["new_tokens"] for p in mine), size, len(mine)))
    for found, levels, total in groups:
        assert {found.get(level, 0) for level in range(levels)} <= {total // levels, -(-total // levels)}
    assert all(0 <= p.at["dram"] < 1 for p in points)


def test_ranges_are_filled_more_evenly_than_by_chance() -> None:
    axes = {name: NumberRange.model_validate({"from": 0.0, "to": 1.0}) for name in ("a", "b", "c")}
    drawn = np.array([[p.at[name] for name in axes] for p in sobol_points(Space({"policies": [axes]}), 64, 3)])
    for column in drawn.T:  # one point in each 64th: what makes it a Sobol sequence
        assert sorted((column * 64).astype(int)) == list(range(64))
    by_chance = [qmc.discrepancy(np.random.default_rng(seed).random((64, 3))) for seed in range(20)]
    assert qmc.discrepancy(drawn) < 0.5 * min(by_chance)
    assert not np.array_equal(drawn[:, 0], [p.at["a"] for p in sobol_points(Space({"policies": [axes]}), 64, 4)])


@pytest.mark.parametrize(("axis", "shares", "expected"), [
    (SizeRange.model_validate({"from": "1 GB", "to": "4 GB"}), (0, 0.5, 1), ["1 GB", "2 GB", "4 GB"]),
    (SizeRange.model_validate({"from": "1 GB", "to": "4 GB", "scale": "linear"}), (0.5,), ["2.5 GB"]),
    (CountRange.model_validate({"from": 16, "to": 1024}), (0, 0.5, 1), [16, 128, 1024]),
    (NumberRange.model_validate({"from": 0.0, "to": 1.0}), (0.12345,), [0.1235]),
    (NumberRange.model_validate({"from": 1, "to": 32}), (0.5,), [16]),
    (NumberRange.model_validate({"from": "1 GB", "to": "3 GB"}), (0.5,), ["2 GB"]),
])
def test_what_lies_along_a_range(axis: Any, shares: tuple[float, ...], expected: list[Any]) -> None:
    assert [axis.at(share) for share in shares] == expected


def test_a_sample_of_lists_alone(tmp_path: Path) -> None:
    """More than is asked for: so many of them, none twice; no more than there are: all of them."""
    lists = SPEC.replace('{ from = "1 GB", to = "4 GB" }', str([f"{i} GB" for i in range(1, 6)]))
    some = cells_of(tmp_path, lists.replace("cells = 8", "cells = 7"))
    assert 1 < len({cell.id for cell in some}) == len(some) <= 7
    assert all(cell.place == cell.id for cell in some)  # which no other draw is compared with
    everything = cells_of(tmp_path, lists.replace("cells = 8", "cells = 10"))
    assert [c.id for c in everything] == [c.id for c in cells_of(tmp_path, lists.replace("sample =", "# sample ="))]


@pytest.mark.parametrize(("old", "new", "key", "says"), [
    ("sample =", "# sample =", "grid.0", "sample = { cells = 64 }"),
    ('to = "4 GB"', 'to = "1 GB"', "grid.0.budgets.0.dram", "from a smaller value to a larger one"),
    ('to = "4 GB"', "to = 4", "grid.0.budgets.0.dram.to", "string"),
    ('to = "4 GB"', 'to = "4"', "grid.0.budgets.0.dram", "no unit"),
    ('to = "4 GB"', 'till = "4 GB"', "grid.0.budgets.0.dram.till", "not a key"),
    ("prompt_tokens = 16", "prompt_tokens = { from = 1.5, to = 9 }", "grid.0.workloads.0.prompt_tokens.from",
     "integer"),
    ("seed = 0", "seed = -1", "grid.0.sample.seed", "greater than or equal to 0"),
    ("refine = 24", 'refine = 24, around = "edge"', "grid.0.sample.around", "boundary"),
    ('{ from = "1 GB", to = "4 GB" }', '["4 GB", "1 GB", "2 GB"]', "grid.0", "neither a range nor a rising list"),
    ("cells = 8", "cells = 99999", "grid.0", "more than 100000 cells"),
])
def test_a_wrong_range_or_sample_is_one_clear_line(tmp_path: Path, old: str, new: str, key: str, says: str) -> None:
    text = SPEC.replace("cells = 8", "cells = 8, seed = 0")
    assert old in text
    with pytest.raises(SpecError) as caught:
        cells_of(tmp_path, text.replace(old, new))
    assert caught.value.key == key and says in caught.value.message and "\n" not in str(caught.value)


def test_without_scipy_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"simmem\[search\]") as caught:
        cells_of(tmp_path, SPEC)
    assert caught.value.key == "grid.0.sample"


# --- its refinement ------------------------------------------------------------------------------------------------


NEEDED = {"iphone15": 1.7e9, "m1-max": 3.1e9}
"""What a made-up planner wants. [B]"""


def size_of(cell: Cell) -> float:
    text = cell.question.dram
    assert text is not None
    return float(text.removesuffix(" GB")) * 1e9


def refined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, figures: Any = lambda cell: {}) -> list[Any]:
    """All cells with what a made-up planner answers, refined to the end; and the refinement."""
    monkeypatch.setattr(refine_module, "passes", lambda cell, outcome: outcome.fits)

    def answers(cells: list[Cell]) -> list[Any]:
        return [(c, SimpleNamespace(fits=size_of(c) >= NEEDED[c.question.device], figures=figures(c))) for c in cells]

    answered = answers(cells_of(tmp_path, text))
    spec, _ = load_search(tmp_path / "s.toml")
    refine = Refinement(spec)
    while more := refine.next(answered):
        assert len(more) <= refine_module.ROUND * len(spec.grid) and all(cell.refined for cell in more)
        answered += answers(more)
    return [answered, refine]


def test_refinement_closes_in_on_the_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each device its own: bisected until no prediction could tell its ends apart."""
    answered, refine = refined(tmp_path, monkeypatch, SPEC)
    assert 8 < len(answered) <= 8 + 24 and len({cell.id for cell, _ in answered}) == len(answered)
    by_id = {cell.id: cell for cell, _ in answered}
    pairs = [(by_id[inside], by_id[outside]) for inside, outside in refine.boundary(answered)]
    assert {inside.question.device for inside, _ in pairs} == set(NEEDED) and len(pairs) == 2
    for inside, outside in pairs:
        needed = NEEDED[inside.question.device]
        assert outside.question.device == inside.question.device
        assert size_of(outside) < needed <= size_of(inside)
        assert size_of(inside) / size_of(outside) < 4 ** (2 * NEAREST) * 1.001  # 4: from 1 to 4 GB
    # Most of what was added lies near: of a sample twice as large as both together hardly any would.
    added = [abs(np.log(size_of(c) / NEEDED[c.question.device])) for c, _ in answered if c.refined]
    assert np.median(added) < 0.05
    again, _ = refined(tmp_path, monkeypatch, SPEC)
    assert [cell.id for cell, _ in again] == [cell.id for cell, _ in answered]


def test_more_refinement_goes_on_from_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that results of a small one are resumed by a larger one."""
    texts = [SPEC.replace("refine = 24", f"refine = {n}") for n in (6, 12)]
    less, more = ([cell.id for cell, _ in refined(tmp_path, monkeypatch, text)[0]] for text in texts)
    assert more[: len(less)] == less and len(less) == 8 + 6


def test_a_rising_list_is_refined_between_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [f"{1 + i / 32:g} GB" for i in range(97)]
    text = SPEC.replace('{ from = "1 GB", to = "4 GB" }', str(sizes))
    answered, refine = refined(tmp_path, monkeypatch, text)
    by_id = {cell.id: cell for cell, _ in answered}
    for inside, outside in refine.boundary(answered):  # next to each other in the list
        assert size_of(by_id[inside]) - size_of(by_id[outside]) == pytest.approx(1e9 / 32)
    assert len(refine.boundary(answered)) == 2


def test_where_nothing_turns_nothing_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEEDED, "iphone15", 0.0)
    monkeypatch.setitem(NEEDED, "m1-max", 0.0)
    answered, refine = refined(tmp_path, monkeypatch, SPEC)
    assert len(answered) == 8 and refine.boundary(answered) == []


def test_a_boundary_beyond_the_sample_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one device pass as they were drawn, and none of the other: cells are added where each would turn."""
    monkeypatch.setitem(NEEDED, "iphone15", 1.02e9)
    monkeypatch.setitem(NEEDED, "m1-max", 3.9e9)
    answered, refine = refined(tmp_path, monkeypatch, SPEC)
    drawn = {(c.question.device, outcome.fits) for c, outcome in answered if not c.refined}
    assert len(drawn) == 2
    assert len(refine.boundary(answered)) == 2


def test_refinement_closes_in_on_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of a made-up planner is where 2.3 GB are held; a compass search gets there."""
    text = SPEC.replace("refine = 24", 'refine = 24, around = "best"')
    for device in NEEDED:
        monkeypatch.setitem(NEEDED, device, 0.0)
    answered, _ = refined(tmp_path, monkeypatch, text,
                          lambda cell: {"token_latency_s": 1.0 + abs(np.log(size_of(cell) / 2.3e9))})
    assert len(answered) > 8
    for device in NEEDED:
        away, is_added = min((abs(np.log(size_of(c) / 2.3e9)), c.refined) for c, _ in answered
                             if c.question.device == device)
        assert away < 0.02 and is_added


def test_a_cell_that_is_added_is_never_one_of_another_grid(tmp_path: Path) -> None:
    """Whose answer it would be given, planned for another objective."""
    listed = SPEC[SPEC.index("[[grid]]"):SPEC.index("sample =")].replace('{ from = "1 GB", to = "4 GB" }', '"2 GB"')
    other = listed + 'objective = "memory"\n'
    named = [text.replace("[[grid]]", f'[[grid]]\nname = "{name}"') for text, name in ((SPEC, "a"), (other, "b"))]
    for both in (SPEC + other, named[0] + other, SPEC + named[1], named[0] + named[1].replace('"b"', '"a"')):
        with pytest.raises(SpecError, match="give each grid a name of its own") as caught:
            cells_of(tmp_path, both)
        assert caught.value.key == "grid" and "\n" not in str(caught.value)
    assert {cell.id.split("/")[0] for cell in cells_of(tmp_path, "".join(named))} == {"a", "b"}
    assert cells_of(tmp_path, (SPEC + other).replace(", refine = 24", ""))  # which cells there are is known at once


def test_of_a_list_longer_than_the_sample_every_entry_is_as_likely() -> None:
    """Of a part and of an axis, alone and by entry; 3 of 10 for 400 seeds: 120 each (binomial, σ = 9.2)."""
    space = Space({"devices": [{}] * 10, "budgets": [{"dram": tuple(range(10))}]})
    drawn = [sobol_points(space, 3, seed) for seed in range(400)]
    for levels in ([p.entries[0] for ps in drawn for p in ps], [p.at["dram"] for ps in drawn for p in ps]):
        assert sum(levels.count(level) for level in range(10)) == 1200
        assert all(abs(levels.count(level) - 120) < 5 * 9.2 for level in range(10))


def test_what_refinement_may_add_to_earlier_grids_counts_too(tmp_path: Path) -> None:
    grids = [SPEC[SPEC.index("[[grid]]"):].replace("[[grid]]", f'[[grid]]\nname = "{name}"') for name in "ab"]
    head, many = SPEC[:SPEC.index("[[grid]]")], "refine = 60000"
    assert len(cells_of(tmp_path, head + grids[0].replace("refine = 24", many) + grids[1])) == 16
    with pytest.raises(SpecError, match="more than 100000 cells") as caught:
        cells_of(tmp_path, head + "".join(grids).replace("refine = 24", many))
    assert caught.value.key == "grid.1"


@pytest.mark.parametrize("around", ["boundary", "best"])
def test_refinement_comes_to_the_last_value_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, around: str
                                                      ) -> None:
    """Where a device passes with nothing less, or both do best."""
    for device, needed in (("iphone15", 4e9), ("m1-max", 2e9)):
        monkeypatch.setitem(NEEDED, device, needed if around == "boundary" else 0.0)
    text = SPEC.replace('{ from = "1 GB", to = "4 GB" }', str([f"{1 + i / 32:g} GB" for i in range(97)]))
    answered, _ = refined(tmp_path, monkeypatch, text.replace("refine = 24", f'refine = 40, around = "{around}"'),
                          lambda cell: {"token_latency_s": 1 / size_of(cell)})
    found = [cell for cell, _ in answered if cell.question.device == "iphone15" and cell.question.dram == "4 GB"]
    assert [cell.refined for cell in found] == [True]


def test_only_what_is_refined_around_its_boundary_lists_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = SPEC[SPEC.index("[[grid]]"):]
    best = grid.replace("refine = 24", 'refine = 24, around = "best"')
    text = SPEC.replace(grid, "".join(one.replace("[[grid]]", f'[[grid]]\nname = "{name}"')
                                      for one, name in ((grid, "edge"), (best, "best"))))
    answered, refine = refined(tmp_path, monkeypatch, text, lambda cell: {"token_latency_s": 1 / size_of(cell)})
    pairs = refine.boundary(answered)
    assert len(pairs) == 2 and all(cell.startswith("edge/") for pair in pairs for cell in pair)
    # Of the other grid, too, some cells of a device pass and some do not.
    assert {outcome.fits for cell, outcome in answered if cell.id.startswith("best/iphone15/")} == {False, True}
