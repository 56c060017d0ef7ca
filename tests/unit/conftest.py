"""Fixtures of the unit tests."""

from pathlib import Path

import pytest
from pictures import write

from clrun.data.decode import FileList


@pytest.fixture
def files(tmp_path: Path) -> FileList:
    """23 images of the stored size: decoding gives them back as they were."""
    for row in range(23):
        write(tmp_path / f"{row:02d}.png", seed=row)
    return FileList(tmp_path, tuple(f"{row:02d}.png" for row in range(23)))
