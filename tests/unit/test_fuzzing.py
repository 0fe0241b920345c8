"""Are the mutations repeatable, many, and harmless to what they mutate?"""

from __future__ import annotations

import copy
import datetime
import json
import random
import tomllib

from tests.unit.fuzzing import mutate_bytes, mutate_json, to_toml
from tests.unit.gguf_files import a_gguf

DOCUMENT = {"a": 1, "b": [1.5, "6 GB", {"c": True, "d": [[2], "x"]}], "e": {"f": "text", "g": {"h": -3}}}


def test_mutated_bytes_follow_from_the_seed_and_differ():
    data = a_gguf()[:2000]  # beyond are zeros
    made = [mutate_bytes(data, random.Random(seed)) for seed in range(400)]
    assert made == [mutate_bytes(data, random.Random(seed)) for seed in range(400)]
    assert len(set(made) - {data}) > 380
    assert sum(len(one) < len(data) / 2 for one in made) > 10, "files that end early"
    assert sum(len(one) == len(data) for one in made) > 100, "files of the right length that lie"
    assert max(len(one) for one in made) < len(data) + 1000


def test_mutations_stay_within_the_header():
    data = bytes(200) + b"weights" * 100
    flipped = [mutate_bytes(data, random.Random(seed), within=200) for seed in range(200)]
    assert all(one.endswith(b"weights" * 50) for one in flipped if len(one) > 200)


def test_nothing_to_mutate_is_no_failure():
    for seed in range(100):
        mutate_bytes(b"", random.Random(seed))
        mutate_bytes(b"\1", random.Random(seed))
        mutate_json({}, random.Random(seed))
        mutate_json(3, random.Random(seed))


def test_mutated_values_follow_from_the_seed_and_leave_the_original():
    before = copy.deepcopy(DOCUMENT)
    texts = [json.dumps(mutate_json(DOCUMENT, random.Random(seed))) for seed in range(400)]
    assert texts == [json.dumps(mutate_json(DOCUMENT, random.Random(seed))) for seed in range(400)]
    assert before == DOCUMENT
    assert len(set(texts) - {json.dumps(DOCUMENT)}) > 250
    everything = "".join(texts)
    assert all(found in everything for found in ("NaN", "Infinity", r"\ud800", r"\u001b", "[[[[", "null"))
    assert any('"a"' not in text for text in texts), "keys that are missing"


def test_toml_says_what_json_said():
    dated = {**DOCUMENT, "with space": {"é.x": [1e308, 10**30]}, "none": None}
    assert tomllib.loads(to_toml(dated)) == {key: value for key, value in dated.items() if value is not None}
    assert tomllib.loads(to_toml({"day": datetime.date(2026, 1, 2)})) == {"day": "2026-01-02"}
    assert tomllib.loads(to_toml({"x": float("inf")})) == {"x": float("inf")}
