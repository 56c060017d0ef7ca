"""The order of the contract tests."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the contract tests of one method together, so that they share its lives in one process."""
    places = [place for place, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    own = sorted((items[place] for place in places), key=_method)
    for place, item in zip(places, own, strict=True):
        items[place] = item


def _method(item: pytest.Item) -> str:
    """Return the name of the method that a test is about; empty for a test about all."""
    return str(item.callspec.params.get("name", "")) if hasattr(item, "callspec") else ""
