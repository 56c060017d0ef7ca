"""Fixtures of the integration tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clrun.cli import main


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """The command in this process, started in `tmp_path`: (exit code, stdout, stderr).

    Keywords are environment variables. A process of its own costs seconds for its imports.
    """
    monkeypatch.chdir(tmp_path)

    def call(*argv: str, **environment: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            for name, value in environment.items():
                patch.setenv(name, value)
            main(argv)
        return (int(end.value.code or 0), *capfd.readouterr())

    return call
