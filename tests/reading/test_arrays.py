"""The reader of npz files against numpy's, and zips against zipfile, at their limits too."""

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nsrl.reading.arrays import read_arrays
from nsrl.reading.limits import MIB, Expansion, Unreadable
from nsrl.reading.zips import opened_zip

DTYPES = [f"{order}{kind}" for order in "<>" for kind in ("f2", "f4", "f8", "i2", "i4", "i8", "u2", "u8")]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
AMPLE = Expansion(MIB, 1)


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"], include_characters="/.-_"), min_size=1, max_size=8),
        hnp.arrays(st.sampled_from([*DTYPES, "b1", "i1", "u1"]), SHAPES),
        max_size=3,
    ),
    st.booleans(),
    st.booleans(),
)
def test_arrays_are_read_as_numpy_reads_them(arrays, compressed, fortran):
    arrays = {name: np.asfortranarray(array) if fortran else array for name, array in arrays.items()}
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **{f"x{name}": array for name, array in arrays.items()})
    found = read_arrays(stream, AMPLE)
    stream.seek(0)
    with np.load(stream) as expected:
        assert list(found) == list(expected)
        for name, array in found.items():
            assert array.dtype == expected[name].dtype and array.shape == expected[name].shape
            assert array.flags.f_contiguous == expected[name].flags.f_contiguous
            assert array.tobytes() == expected[name].tobytes()
            assert not array.flags.writeable and array.base is None


def test_all_versions_of_the_header():
    array = np.arange(6.0).reshape(2, 3)
    for version in ((1, 0), (2, 0), (3, 0)):
        member, stream = io.BytesIO(), io.BytesIO()
        np.lib.format.write_array(member, array, version)
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("a.npy", member.getvalue())
        assert np.array_equal(read_arrays(stream, AMPLE)["a"], array)


def zipped(method, **members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


@settings(max_examples=50)
@given(
    st.dictionaries(st.sampled_from("abc"), st.binary(max_size=200_000)),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
)
def test_members_are_those_that_zipfile_reads(members, method):
    with opened_zip(zipped(method, **members), AMPLE) as found:
        assert {name: found.read(name) for name in found.sizes} == members


def test_a_zip_may_come_to_so_much_and_no_more():
    content = zipped(zipfile.ZIP_DEFLATED, a=bytes(5000), b=bytes(5000))
    with opened_zip(content, Expansion(10_000, 1)) as members:
        assert members.read("a", 5000) == bytes(5000)
        with pytest.raises(Unreadable, match="limit"):
            members.read("a", 4999)
    with pytest.raises(Unreadable, match="would unpack to 10000"):
        with opened_zip(content, Expansion(9999, 1)):
            pass
    # a larger file may come to more
    stored = zipped(zipfile.ZIP_STORED, a=bytes(5000), b=bytes(5000))
    with opened_zip(stored, Expansion(0, 1)) as members:
        assert members.read("b") == bytes(5000)


def test_a_member_that_is_not_read_to_its_end_is_told():
    with opened_zip(zipped(zipfile.ZIP_STORED, a=b"abc"), AMPLE) as members:
        with pytest.raises(Unreadable, match="another size"):
            with members.opened("a") as member:
                member.read(1)
        with pytest.raises(Unreadable, match="no b"):
            members.read("b")


def test_a_file_behind_other_bytes_is_found_as_zipfile_finds_it():
    with opened_zip(b"#!/bin/sh\n" + zipped(zipfile.ZIP_STORED, a=b"abc"), AMPLE) as members:
        assert members.read("a") == b"abc"
