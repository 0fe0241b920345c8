"""Does a capture that is stopped at any moment keep what it finished, and go on to the same bits?"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmem.errors import MachineError, SpecError
from simmem.runtime import capture as capturing
from simmem.runtime.capture import capture_from
from simmem.runtime.models import LoadedModel
from simmem.runtime.stream import Partial, discard, partial_folder
from simmem.trace.store import load_trace_file, save_trace
from tests.runtime.tiny import PROSE, make, save

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

# Passes of 8 tokens behind 56 of context: six of them.
ASKED: dict[str, Any] = {"tokens": 48, "context": 56, "calibration_tokens": 200, "evaluation_tokens": 100}
N_PASSES = 6


class Killed(BaseException):
    """Stands for the end of the process: nothing handles it."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_timings_and_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of a capture this small, and come after everything that is kept."""
    monkeypatch.setattr(capturing, "time_decode", lambda *_: ({}, ""))
    monkeypatch.setattr(capturing, "replay_document", lambda _: {"curves": []})


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return make("llama")


@pytest.fixture(scope="module")
def whole(model: LoadedModel) -> str:
    return capture_from(model, PROSE, **ASKED).header.digest


def nth(n: int, call: Callable[..., Any], error: BaseException, *, after: bool = False) -> Callable[..., Any]:
    """`call`, but the n-th time it raises, before or after it has done its work."""
    left = [n]

    def replaced(*args: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and not after:
            raise error
        result = call(*args, **named)
        if left[0] == 0:
            raise error
        return result

    return replaced


class Counted:
    """A function that knows how often it was called."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.calls = call, 0

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.calls += 1
        return self.call(*args, **named)


def chunks(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("chunk-*.safetensors")}


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("where", ["before it is flushed", "before it is renamed", "behind the renaming"])
def test_stopped_at_any_write_it_goes_on_to_the_same_bits(model: LoadedModel, tmp_path: Path, where: str, decode: bool,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ASKED | {"decode": decode}
    expected = capture_from(model, PROSE, **asked).header.digest
    for n in range(1, N_PASSES + 4, 3 if decode else 1):  # the manifest, the thresholds, every pass, the perplexities
        folder = tmp_path / f"{n}.partial"
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            if where == "before it is flushed":
                patch.setattr(os, "fsync", nth(n, os.fsync, Killed()))
            else:
                patch.setattr(Path, "replace", nth(n, Path.replace, Killed(), after=where.startswith("behind")))
            capture_from(model, PROSE, partial=folder, **asked)
            raise AssertionError("it was not stopped")
        finished = chunks(folder)
        with monkeypatch.context() as patch:
            run_one = Counted(getattr(capturing, "decode_pass" if decode else "forced_pass"))
            patch.setattr(capturing, run_one.call.__name__, run_one)
            trace = capture_from(model, PROSE, partial=folder, resume=True, **asked)
        assert trace.header.digest == expected
        assert run_one.calls == N_PASSES - len(finished), "a finished pass was run again"
        assert finished.items() <= chunks(folder).items()
        discard(folder)
        assert not folder.exists()


def killed_in(seconds: float, work: Callable[[], None]) -> bool:
    """Run `work` in a process of its own that is killed after some time; False where it was through by then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # one thread here, whatever torch keeps
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "the capture failed"
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork")
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_nothing_is_lost_or_false(model: LoadedModel, tmp_path: Path, whole: str,
                                                           kills: int) -> None:
    out, chance, died, midway = tmp_path / "t.safetensors", random.Random(kills), 0, 0
    folder = partial_folder(out)

    def work() -> None:
        save_trace(capture_from(model, PROSE, partial=folder, resume=True, **ASKED), out)

    began = time.monotonic()
    work()
    takes = time.monotonic() - began
    for _ in range(20 * kills):
        if out.exists():
            assert load_trace_file(out).header.digest == whole, "what is in place is whole"
            out.unlink()
            discard(folder)
        before = chunks(folder)
        died += killed_in(chance.uniform(0, 1.1 * takes), work)
        assert before.items() <= chunks(folder).items(), "a finished pass is gone or was written again"
        midway += 0 < len(chunks(folder)) < N_PASSES
        if died == kills:
            break
    assert died == kills
    assert midway or kills < 50
    work()
    assert load_trace_file(out).header.digest == whole
    assert not [path for path in tmp_path.iterdir() if path not in (out, folder) and ".tmp" not in path.name]


def test_a_damaged_chunk_is_recorded_again(model: LoadedModel, tmp_path: Path, whole: str) -> None:
    folder = tmp_path / "t.partial"
    capture_from(model, PROSE, partial=folder, **ASKED)
    first, second, third = (folder / f"chunk-{i:06d}.safetensors" for i in range(3))
    raw = bytearray(first.read_bytes())
    raw[-5] ^= 1
    first.write_bytes(raw)
    second.write_bytes(second.read_bytes()[:100])
    third.write_bytes((folder / "chunk-000004.safetensors").read_bytes())  # another pass's
    note = folder / "note-thresholds.json"
    digit = note.read_text(encoding="utf-8").rindex("1")
    note.write_text(note.read_text(encoding="utf-8")[:digit] + "2" + note.read_text(encoding="utf-8")[digit + 1:],
                    encoding="utf-8")
    (folder / "note-quality-2.json").write_bytes(b"\xff{")
    assert capture_from(model, PROSE, partial=folder, resume=True, **ASKED).header.digest == whole


@pytest.mark.parametrize(("change", "says"), [
    ({"tokens": 56}, "tokens was 48, now 56"), ({"criterion": "gate"}, "criterion was 'wina', now 'gate'"),
    ({"sparsity": 0.7}, "sparsity was 0.5, now 0.7"), ({"context": 48}, "context was 56, now 48"),
    ({"levels": (0.2,)}, r"levels was \[0\.3, .*\], now \[0\.2\]")])
def test_another_request_is_not_gone_on_with(model: LoadedModel, tmp_path: Path, change: dict[str, Any],
                                             says: str) -> None:
    folder = tmp_path / "t.partial"
    capture_from(model, PROSE, partial=folder, **ASKED)
    with pytest.raises(SpecError, match=f"of another request: {says}"):
        capture_from(model, PROSE, partial=folder, resume=True, **ASKED | change)


def test_another_model_text_or_number_of_threads_is_another_request(model: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "t.partial"
    capture_from(model, PROSE, partial=folder, **ASKED)
    with pytest.raises(SpecError, match="weights was"):
        capture_from(make("llama", seed=8), PROSE, partial=folder, resume=True, **ASKED)
    other = capturing.SourceText(PROSE.content.replace("best", "most"), PROSE.title, None)
    with pytest.raises(SpecError, match="text was"):
        capture_from(model, other, partial=folder, resume=True, **ASKED)
    torch.set_num_threads(2)
    with pytest.raises(SpecError, match=r"host was .* now"):
        capture_from(model, PROSE, partial=folder, resume=True, **ASKED)
    torch.set_num_threads(1)
    with pytest.raises(SpecError, match="--resume goes on with it, or remove the folder"):
        capture_from(model, PROSE, partial=folder, **ASKED)


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "t.partial"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(SpecError, match=r"holds 'thesis\.txt', which is not of a capture"):
        Partial(folder, {})
    discard(folder)
    assert (folder / "thesis.txt").is_file()
    with pytest.raises(SpecError, match="is in the way"):
        Partial(folder / "thesis.txt", {})
    with pytest.raises(MachineError, match="No such file"):
        Partial(tmp_path / "none" / "t.partial", {})
    (folder / "thesis.txt").unlink()
    (folder / "manifest.json").write_text("[" * 10_000, encoding="utf-8")
    (folder / "note-thresholds.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SpecError, match="is damaged"):
        Partial(folder, {}, resume=True)


def test_where_nothing_was_finished_there_is_nothing_to_go_on_with(model: LoadedModel, tmp_path: Path, whole: str
                                                                   ) -> None:
    folder = tmp_path / "t.partial"
    Partial(folder, {"tokens": 7})
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert capture_from(model, PROSE, partial=folder, **ASKED).header.digest == whole


def test_a_full_disk_is_the_machines_failure_and_loses_nothing(model: LoadedModel, tmp_path: Path, whole: str,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "t.partial"
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(os, "fsync", nth(5, os.fsync, full))
        with pytest.raises(MachineError, match="No space left on device; what was finished is kept") as caught:
            capture_from(model, PROSE, partial=folder, **ASKED)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert len(chunks(folder)) == 2  # behind the manifest and the thresholds
    assert not list(folder.glob("*.tmp"))
    assert capture_from(model, PROSE, partial=folder, resume=True, **ASKED).header.digest == whole


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_killed(model: LoadedModel, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    save(model, tmp_path / "tiny")
    (tmp_path / "prose.txt").write_text(PROSE.content, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("simmem")), "capture", "--model", str(tmp_path / "tiny"), "--text",
               str(tmp_path / "prose.txt"), "--json", "--threads", "1", "--tokens", "400", "--context", "56",
               "--calibration-tokens", "200", "--evaluation-tokens", "100"]

    def run(out: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, "--out", str(tmp_path / out), *more], capture_output=True, text=True,
                              timeout=300, check=False)

    expected = run("whole.safetensors")
    assert expected.returncode == 0, expected.stderr
    for _ in range(3):
        process = subprocess.Popen([*command, "--out", str(tmp_path / "t.safetensors"), "--resume"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("recording") and random.Random(0).random() < 0.9:
                break
        process.kill()
        process.wait()
        process.stderr.close()
    assert chunks(tmp_path / "t.safetensors.partial")
    refused = run("t.safetensors")
    assert refused.returncode == 2
    assert "--resume goes on" in json.loads(refused.stdout)["message"]
    resumed = run("t.safetensors", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["digest"] == json.loads(expected.stdout)["digest"]
    np.testing.assert_array_equal(load_trace_file(tmp_path / "t.safetensors").active,
                                  load_trace_file(tmp_path / "whole.safetensors").active)
    assert not (tmp_path / "t.safetensors.partial").exists()
