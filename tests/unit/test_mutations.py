"""The mistakes of scripts/mutations.py still are what they say: none has lost the text that it changes."""

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MUTATIONS: tuple[Any, ...] = runpy.run_path(str(ROOT / "scripts" / "mutations.py"), run_name="mutations")["MUTATIONS"]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_is_there_once_and_the_mistake_is_code(mutation: Any) -> None:
    text = (ROOT / "clrun" / mutation.file).read_text()
    assert text.count(mutation.old) == 1, "follow the code: change the texts of this mutation, not what it breaks"
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(text.replace(mutation.old, mutation.new)))
    assert mutation.tests and all((ROOT / "tests" / file).is_file() for file in mutation.tests)


def test_names_are_unique_and_there_are_enough() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 20
