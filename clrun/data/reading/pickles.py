"""Pickled arrays from the internet: read by an unpickler that builds only arrays, so that no foreign code runs."""

import pickle
from pathlib import Path
from typing import Any

# The functions and classes in pickled NumPy arrays, under the names that NumPy 1, NumPy 2 and Python 2 wrote.
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
        """Return a function or class that pickled arrays consist of.

        Raises:
            pickle.UnpicklingError: the pickle names anything else.
        """
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"names {module}.{name}, which is not part of an array; nothing was run")
        return super().find_class(module, name)


def read_arrays(path: Path) -> Any:
    """Return the content of a pickle of containers, numbers, texts and arrays, also one written by Python 2.

    Raises:
        OSError: the file cannot be read.
        pickle.UnpicklingError: the file names anything that is not part of an array.
    """
    with path.open("rb") as file:
        return ArrayUnpickler(file, encoding="latin1").load()
