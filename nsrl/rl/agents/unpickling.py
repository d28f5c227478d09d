"""The observation statistics in a pickle of VecNormalize, read as data: see `nsrl.reading.pickles`.

Of each class on the list the attributes named here are kept and no others, and only exact numbers, texts, mappings and
arrays get any further: numpy takes an instance with an attribute such as `__array_interface__` for an array, at the
address that it says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nsrl.errors import NsrlError
from nsrl.reading.arrays import checked_shape, number_type
from nsrl.reading.limits import STATISTICS, Unreadable, read_bytes, shown
from nsrl.reading.pickles import BUILTINS, ForeignName, Names, Part, parse_pickle

Statistic = np.ndarray | dict[str, np.ndarray]
#: The modules that `RetainingVecNormalize` and `FrozenMeanStd` have lived in. Pickles name the one that they were saved
#: from: when they move, add the new name, and never take one away.
OUR_HOMES = ("nsrl.rl.normalization", "nsrl.rl.agents.normalization")


@dataclass(frozen=True)
class SavedStatistics:
    """What a VecNormalize that normalises observations holds.

    Attributes:
        mean, var: float64, of the shape of one observation; by key for Dict observations.
        epsilon, clip_obs, count: as in `nsrl.rl.agents.normalization.ObservationNormalizer`.
    """

    mean: Statistic
    var: Statistic
    epsilon: float
    clip_obs: float
    count: float


class Record(Part):
    """An object of which some attributes are kept."""

    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def take(self, state: Any) -> None:
        """Keep what is on the list."""
        if type(state) is dict:
            self.attributes |= {name: state[name] for name in self.kept if name in state}

    def given(self, name: str) -> Any:
        """An attribute.

        Raises:
            Unreadable: the file does not give it.
        """
        if name not in self.attributes:
            raise Unreadable(f"it lacks {name}")
        return self.attributes[name]


class Normalizer(Record):
    """A VecNormalize."""

    kept = ("norm_obs", "obs_rms", "epsilon", "clip_obs")


class Running(Record):
    """A RunningMeanStd."""

    kept = ("mean", "var", "count")


class NumberType(Part):
    """A dtype: a code such as "f8" and, from its state, the byte order."""

    def __init__(self, code: Any = "", order: Any = "="):
        self.code, self.order = code, order

    @classmethod
    def made(cls, *arguments: Any) -> NumberType:
        """The dtype of a code."""
        return cls(*arguments[:1])

    def take(self, state: Any) -> None:
        """Take the byte order.

        Raises:
            Unreadable: it has fields or sub-arrays, and so is no number.
        """
        if type(state) is not tuple or not 5 <= len(state) <= 9:
            raise Unreadable("the state of a dtype is damaged")
        plain = all(part is None for part in state[2:5])
        self.order = state[1] if plain and state[1] in ("<", ">", "|", "=") else None

    def numeric(self) -> np.dtype:
        """The dtype.

        Raises:
            Unreadable: it is of something other than numbers.
        """
        return number_type(f"{self.order}{self.code}" if type(self.order) is type(self.code) is str else None)


class Array(Part):
    """An array, of which nothing has been looked at yet."""

    def __init__(self, raw: Any = None, number: Any = None, shape: Any = None, order: Any = None):
        self.raw, self.number, self.shape, self.order = raw, number, shape, order

    def take(self, state: Any) -> None:
        """Take version, shape, dtype, whether it is in Fortran's order, and bytes.

        Raises:
            Unreadable: there are fewer, more or others.
        """
        if type(state) is not tuple or len(state) != 5:
            raise Unreadable("the state of an array is damaged")
        _, self.shape, self.number, fortran, self.raw = state
        self.order = "F" if fortran is True else "C"

    def values(self) -> np.ndarray:
        """The numbers, (...,), as numpy would have read them.

        Raises:
            Unreadable: it holds something else, or its size does not fit its shape.
        """
        if type(self.number) is not NumberType or type(self.raw) is not memoryview or self.order not in ("C", "F"):
            raise Unreadable("an array does not hold numbers")
        dtype, shape = self.number.numeric(), checked_shape(self.shape)
        if math.prod(shape) * dtype.itemsize != len(self.raw):
            raise Unreadable(f"an array of shape {shape} and type {dtype} has {len(self.raw)} bytes")
        return np.frombuffer(self.raw, dtype=dtype).reshape(shape, order=self.order)


class Reconstructed(Part):
    """numpy's `_reconstruct`: an empty array for its state to fill."""

    @classmethod
    def made(cls, *arguments: Any) -> Array:
        """An array without content as yet."""
        return Array()


class FromBuffer(Part):
    """numpy's `_frombuffer`, the form of arrays in protocol 5: bytes, dtype, shape, order."""

    @classmethod
    def made(cls, *arguments: Any) -> Array:
        """The array. In orders other than C and F its axes are permuted, which those of SB3 never are."""
        return Array(*arguments[:4]) if len(arguments) in (4, 5) else Array()


class Scalar(Part):
    """numpy's `scalar`: dtype and bytes."""

    @classmethod
    def made(cls, *arguments: Any) -> Any:
        """A plain number; None for what is none."""
        number, raw = arguments if len(arguments) == 2 else (None, None)
        try:
            return Array(raw, number, (), "C").values().item()
        except Unreadable:  # an info may hold a date: nothing that is looked at
            return None


def _names(kind: type[Part], names: dict[str, str]) -> Names:
    return {(module, name): kind for module, listed in names.items() for name in listed.split()}


GYMS = ("gymnasium", "gym")
ALLOWED: Names = {
    **BUILTINS,
    **_names(Normalizer, {"stable_baselines3.common.vec_env.vec_normalize": "VecNormalize"}),
    **_names(Running, {"stable_baselines3.common.running_mean_std": "RunningMeanStd"}),
    **_names(Normalizer, dict.fromkeys(OUR_HOMES, "RetainingVecNormalize")),
    **_names(Running, dict.fromkeys(OUR_HOMES, "FrozenMeanStd")),
    # Spaces, and the random generators that they carry: read over.
    **_names(
        Record,
        {
            **{f"{gym}.spaces.box": "Box" for gym in GYMS},
            **{f"{gym}.spaces.dict": "Dict" for gym in GYMS},
            **{f"{gym}.spaces.discrete": "Discrete" for gym in GYMS},
            **{f"{gym}.spaces.multi_discrete": "MultiDiscrete" for gym in GYMS},
            **{f"{gym}.spaces.multi_binary": "MultiBinary" for gym in GYMS},
            "gym.utils.seeding": "RandomNumberGenerator RandomNumberGenerator._generator_ctor",
            "numpy.random._pickle": "__generator_ctor __bit_generator_ctor __randomstate_ctor",
            "numpy.random._pcg64": "PCG64 PCG64DXSM",
            "numpy.random._mt19937": "MT19937",
            "numpy.random._philox": "Philox",
            "numpy.random._sfc64": "SFC64",
            "numpy.random._generator": "Generator",
            "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
        },
    ),
    ("numpy", "dtype"): NumberType,
    ("numpy", "ndarray"): Array,
    # numpy 1 and 2 differ in the module's name only.
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Reconstructed for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): FromBuffer for core in ("core", "_core")},
}


def read_statistics(path: str | Path) -> SavedStatistics | None:
    """The observation statistics in the pickle of a VecNormalize; None where it normalises rewards only.

    Raises:
        NsrlError: the file is missing, damaged or too large, holds something else, or names a class or function that is
            not on the list.
    """
    try:
        value, _ = parse_pickle(memoryview(read_bytes(path, STATISTICS)), ALLOWED)
        if type(value) is not Normalizer:
            raise NsrlError(f"cannot use {path}: it holds no VecNormalize")
        return _statistics(value)
    except ForeignName as error:
        raise NsrlError(
            f"{path} asks to import {error.name}, which observation statistics do not need; if you trust whoever made "
            "the file, trust=True (--trust) would import and run it"
        ) from error
    except Unreadable as error:
        raise NsrlError(f"{path} holds no observation statistics or is damaged: {error}; save them again") from error
    except OSError as error:
        raise NsrlError(f"cannot read {path}: {error.strerror or error}") from error


def _statistics(value: Normalizer) -> SavedStatistics | None:
    if type(value.given("norm_obs")) not in (bool, int):
        raise Unreadable(f"norm_obs is {shown(value.given('norm_obs'))}, not true or false")
    if not value.given("norm_obs"):
        return None
    running = value.given("obs_rms")
    parts = running if type(running) is dict else {"": running}
    if not parts or any(type(key) is not str or type(part) is not Running for key, part in parts.items()):
        raise Unreadable("obs_rms is no RunningMeanStd")
    mean, var = ({key: _numbers(part.given(name), name) for key, part in parts.items()} for name in ("mean", "var"))
    return SavedStatistics(
        mean=mean if type(running) is dict else mean[""],
        var=var if type(running) is dict else var[""],
        epsilon=_number(value.given("epsilon"), "epsilon"),
        clip_obs=_number(value.given("clip_obs"), "clip_obs"),
        count=max(_number(part.given("count"), "count") for part in parts.values()),
    )


def _number(value: Any, name: str) -> float:
    value = value.values().item() if type(value) is Array and value.shape == () else value
    if type(value) not in (int, float):
        raise Unreadable(f"{name} is {shown(value)}, not a number")
    return float(value)


def _numbers(value: Any, name: str) -> np.ndarray:
    """Float64, from an array, a number, or a list of numbers."""
    if type(value) is Array:
        return value.values().astype(np.float64)
    values = value if type(value) in (list, tuple) else [value]
    if any(type(entry) not in (int, float) for entry in values):
        raise Unreadable(f"{name} is {shown(value)}, not an array of numbers")
    array = np.array(values, dtype=np.float64)
    return array if values is value else array.reshape(())
