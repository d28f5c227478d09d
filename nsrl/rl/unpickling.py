"""Reading a pickle as data: every class in it is replaced by an inert stand-in, and unknown ones are refused.

A pickle is a program that imports and calls. Here it can import nothing: the few names on the allow list
stand for classes of this file that only record what they are given, numbers are read with `numpy.frombuffer`
from the raw bytes, and numpy's own reconstruction code, which trusts its input, is never reached.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from nsrl.errors import NsrlError


class Sealed(type):
    """Metaclass that refuses assignment: a pickle can set attributes of whatever it names, classes too."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError(f"{cls.__name__} is sealed")


class Record(metaclass=Sealed):
    """Stand-in for an object: inert, with the attributes that its state names."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class NumberType(metaclass=Sealed):
    """Stand-in for `numpy.dtype`: a code such as "f8" and, from its state, the byte order."""

    def __init__(self, code: str, *flags: Any) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: Any) -> None:
        self.order = {"<": "<", ">": ">", "|": "|", "=": "="}[state[1]]

    def numeric(self) -> np.dtype | None:
        """The dtype, None for what is no number: objects, text, dates, structures."""
        if self.code[:1] not in "fiub" or not self.code[1:].isdigit():
            return None
        return np.dtype(self.order + self.code)


class Array(metaclass=Sealed):
    """Stand-in for a numpy array, which numpy can read where its elements are numbers."""

    values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, number_type, fortran, raw = state
        self.values = numbers(raw, number_type, shape, "F" if fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.values is None:
            raise TypeError("an array does not hold numbers")
        return np.array(self.values, dtype=dtype)


class Reconstructed(metaclass=Sealed):
    """Stand-in for numpy's `_reconstruct`, which makes an empty array for its state to fill."""

    def __new__(cls, *arguments: Any) -> Any:
        """An array without values yet."""
        return Array()


class FromBuffer(metaclass=Sealed):
    """Stand-in for numpy's `_frombuffer`, the form of arrays in pickle protocol 5."""

    def __new__(cls, raw: Any, number_type: Any, shape: Any, order: str = "C", *axes: Any) -> Any:
        """The whole array."""
        array = Array()
        # In orders other than C and F the buffer's axes are permuted; SB3's statistics never are.
        array.values = numbers(raw, number_type, shape, order) if order in ("C", "F") else None
        return array


class Scalar(metaclass=Sealed):
    """Stand-in for numpy's `scalar`: gives a plain Python number, or None for what is no number."""

    def __new__(cls, number_type: Any, raw: Any = b"") -> Any:
        """The number itself."""
        values = numbers(raw, number_type, (), "C")
        return None if values is None else values.item()


def numbers(raw: Any, number_type: Any, shape: Any, order: str) -> np.ndarray | None:
    """Array from the raw bytes, None where the elements are no numbers."""
    dtype = number_type.numeric()
    if dtype is None:
        return None
    flat = np.frombuffer(bytes(raw), dtype=dtype)
    return flat.reshape(tuple(int(size) for size in shape), order="F" if order == "F" else "C")


def _records(names: dict[str, str]) -> dict[tuple[str, str], type]:
    return {(module, name): Sealed(name, (Record,), {}) for module, listed in names.items() for name in listed.split()}


VEC_NORMALIZE = ("stable_baselines3.common.vec_env.vec_normalize", "VecNormalize")
GYMS = ("gymnasium", "gym")
ALLOWED: dict[tuple[str, str], Any] = {
    **_records({VEC_NORMALIZE[0]: VEC_NORMALIZE[1], "stable_baselines3.common.running_mean_std": "RunningMeanStd"}),
    **_records({"nsrl.rl.normalization": "RetainingVecNormalize FrozenMeanStd"}),
    **_records({f"{gym}.spaces.box": "Box" for gym in GYMS}),
    **_records({f"{gym}.spaces.dict": "Dict" for gym in GYMS}),
    **_records({f"{gym}.spaces.discrete": "Discrete" for gym in GYMS}),
    **_records({f"{gym}.spaces.multi_discrete": "MultiDiscrete" for gym in GYMS}),
    **_records({f"{gym}.spaces.multi_binary": "MultiBinary" for gym in GYMS}),
    **_records({"gym.utils.seeding": "RandomNumberGenerator RandomNumberGenerator._generator_ctor"}),
    # Random generators that spaces carry.
    **_records(
        {
            "numpy.random._pickle": "__generator_ctor __bit_generator_ctor __randomstate_ctor",
            "numpy.random._pcg64": "PCG64 PCG64DXSM",
            "numpy.random._mt19937": "MT19937",
            "numpy.random._philox": "Philox",
            "numpy.random._sfc64": "SFC64",
            "numpy.random._generator": "Generator",
            "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
        }
    ),
    ("numpy", "dtype"): NumberType,
    ("numpy", "ndarray"): Array,
    ("collections", "OrderedDict"): dict,
    **{("builtins", kind.__name__): kind for kind in (bytearray, dict, frozenset, list, set, tuple)},
    # numpy 1 and 2 differ in the module's name only.
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Reconstructed for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): FromBuffer for core in ("core", "_core")},
}


class _InertUnpickler(pickle.Unpickler):
    path: Path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise NsrlError(
                f"{self.path} asks to import {module}.{name}, which observation statistics do not need; if "
                "you trust whoever made the file, trust=True (--trust) would import and run it"
            )
        return ALLOWED[module, name]


def read_pickle(path: str | Path) -> Any:
    """The object in a pickle, with `Record`, `Array` and plain values in place of its classes.

    Raises:
        NsrlError: the file is missing, damaged, or names a class or function that is not on the allow list.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            unpickler = _InertUnpickler(file)
            unpickler.path = path
            return unpickler.load()
    except NsrlError:
        raise
    except OSError as error:
        raise NsrlError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise NsrlError(f"{path} is not a pickle or is damaged ({error}); save the statistics again") from error
