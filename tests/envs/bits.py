"""Whether two things are the same to the last bit."""

import numpy as np


def assert_same_bits(found, expected) -> None:
    """Equal types, keys in equal order, and equal bits of all numbers; wall times aside."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert list(found) == list(expected)
        for key, value in found.items():
            if key != "t":
                assert_same_bits(value, expected[key])
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
    elif isinstance(found, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
    elif isinstance(found, float):
        assert found.hex() == expected.hex()
    else:
        assert found == expected
