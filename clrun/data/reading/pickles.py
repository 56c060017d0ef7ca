"""Pickled arrays from the internet: opened by an unpickler that builds arrays and nothing else, hence runs no code."""

import pickle
from pathlib import Path
from typing import Any

# What pickled NumPy arrays are made of, under the names that NumPy 1 and 2 and Python 2 wrote.
ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler of containers, numbers, texts and NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a part of arrays.

        Raises:
            pickle.UnpicklingError: anything else is named.
        """
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"names {module}.{name}, which is no part of an array; nothing was run")
        return super().find_class(module, name)


def read_arrays(path: Path) -> Any:
    """Return the content of a pickle of containers, numbers, texts and arrays, also one written by Python 2.

    Raises:
        OSError: the file cannot be read.
        pickle.UnpicklingError: it names anything that is no part of an array.
    """
    with path.open("rb") as file:
        return ArrayUnpickler(file, encoding="latin1").load()
