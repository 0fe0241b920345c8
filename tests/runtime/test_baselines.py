"""Do the baselines run what they say: every page or file again for each token, or none?"""

from __future__ import annotations

from pathlib import Path

import pytest

from simmem.errors import SpecError
from simmem.runtime.execute.baselines import PageCache, accelerate_token_s, mapped_token_s
from simmem.runtime.execute.task import task_of
from simmem.spec.model import load_model
from tests.runtime import tiny
from tests.runtime.executing import STREAM, candidate, spec_of

N_TOKENS = 4


def bytes_from_drives() -> int | None:
    """What this process had read from drives, as the kernel counts it."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@pytest.mark.parametrize("page_cache", ["kept", "dropped"])
def test_a_mapped_file_is_read_again_where_its_pages_are_dropped(tmp_path: Path, page_cache: PageCache) -> None:
    model = load_model("relu-decoder-4m")  # large enough that reading ahead does not blur the count
    plan, file = candidate(model, "resident", {"agent": "cpu"}), tmp_path / "weights"
    mapped_token_s(task_of(plan, 1), file, page_cache, threads=1)
    before = bytes_from_drives()
    took = mapped_token_s(task_of(plan, N_TOKENS), file, page_cache, threads=1)
    after = bytes_from_drives()
    assert took.shape == (N_TOKENS,)
    assert (took > 0).all()
    if before is None or after is None:
        pytest.skip("the kernel does not say what a process reads")
    times = (after - before) / task_of(plan, 1).layout.n_bytes
    if page_cache == "kept":
        assert times < 0.1
    else:  # a folder in memory is never read from a drive
        assert times == 0 or N_TOKENS * 0.9 < times < (N_TOKENS + 1) * 1.1


def test_only_what_is_resident_is_mapped(tmp_path: Path) -> None:
    plan = candidate(load_model("relu-decoder-4m"), "stream", STREAM)
    with pytest.raises(SpecError, match="everything resident"):
        mapped_token_s(task_of(plan, 2), tmp_path / "weights", "kept", threads=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_disk_offload_keeps_every_weight_in_files(tmp_path: Path, family: str) -> None:
    pytest.importorskip("accelerate", reason="the baseline is what accelerate does")
    network = tiny.make(family)
    model, folder = spec_of(network, tmp_path / "model"), tmp_path / "offloaded"
    folder.mkdir()
    took = accelerate_token_s(model, "fp32", folder, "dropped", context=8, n_tokens=N_TOKENS, threads=1)
    assert took.shape == (N_TOKENS,)
    stored = sum(p.stat().st_size for p in folder.glob("*.dat"))
    assert stored == 4 * sum(t.numel() for t in network.network.state_dict().values()), "a tied matrix under both names"


def test_other_networks_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the baseline is what accelerate does")
    with pytest.raises(SpecError, match="neither built like Llama nor like OPT"):
        accelerate_token_s(load_model("falcon-7b"), "fp32", tmp_path, "kept", context=8, n_tokens=1)
