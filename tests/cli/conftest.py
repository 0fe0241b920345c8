"""How is the real command run inside a test? `simmem.cli.run` with arguments: exit code, stdout and stderr."""

from __future__ import annotations

import pytest

from simmem.cli import main
from tests.cli.pages import Pages
from tests.cli.running import Ended, Simmem


@pytest.fixture
def simmem(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Simmem:
    """Run `simmem ARGUMENTS` in this process; output is as wide as a plain terminal."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Ended(stop.value.code, out, err)

    return run


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Documents and their pages, for all tests of `simmem report`."""
    return Pages(tmp_path_factory.mktemp("pages"))
