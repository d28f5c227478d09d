"""The reader of tensors against `torch.load`, to the last bit, in both forms that torch has written."""

import io
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nsrl.reading.limits import Unreadable
from nsrl.reading.tensors import STORAGES, VIEWS, like, read_tensors

FORMS = [{}, {"_use_new_zipfile_serialization": False}]


def saved(value, **options):
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def bits(tensor):
    return torch.stack([*tensor.detach().flatten()]).view(torch.uint8).tolist() if tensor.numel() else []


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        described = [(t.dtype, t.shape, t.stride(), t.storage_offset() * bool(t.numel())) for t in (found, expected)]
        return described[0] == described[1] and bits(found) == bits(expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and repr(found) == repr(expected)


def both(value, **options):
    content = saved(value, **options)
    return read_tensors(content), torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(list(STORAGES.values())))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 10)))
    tensor = (50 * torch.rand(shape, generator=seed)).to(dtype)
    if tensor.ndim and draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(tensor.ndim))))
    if tensor.ndim and tensor.shape[0] and draw(st.booleans()):
        tensor = tensor[draw(st.integers(0, tensor.shape[0] - 1)) :: draw(st.integers(1, 2))]
    return tensor


VALUES = st.recursive(
    tensors() | st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(VALUES, st.sampled_from(FORMS))
def test_values_are_read_as_torch_reads_them(value, form):
    assert same(*both(value, **form))


@pytest.mark.parametrize("form", FORMS)
def test_modules_and_optimizers(form):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(3, 2))
    optimizer = torch.optim.Adam(module.parameters(), amsgrad=True)
    module[:2](torch.randn(5, 3)).sum().backward()
    optimizer.step()
    value = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "parameter": module[0].weight}
    found, expected = both(value, **form)
    assert same(found, expected)
    fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(3, 2))
    fresh.load_state_dict(found["module"])
    assert same(dict(fresh.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_one_storage_go_on_sharing_it(form):
    whole = torch.arange(12.0)
    found, _ = both({"a": whole, "b": whole.view(3, 4).t(), "c": whole[5:]}, **form)
    found["a"][5] = -1.0
    assert found["b"][1, 1] == -1.0 and found["c"][0] == -1.0


def test_big_endian_files():
    value = OrderedDict(a=torch.randn(3), b=torch.arange(4, dtype=torch.int16), c=torch.tensor([True, False]))
    with zipfile.ZipFile(io.BytesIO(saved(value))) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    swapped = io.BytesIO()
    with zipfile.ZipFile(swapped, "w") as archive:
        for name, content in parts.items():
            size = {"0": 4, "1": 2, "2": 1}.get(name.rpartition("/data/")[2], 0)
            if size:
                content = b"".join(content[at : at + size][::-1] for at in range(0, len(content), size))
            archive.writestr(name, b"big" if name.endswith("byteorder") else content)
    assert same(read_tensors(swapped.getvalue()), dict(value))


def test_a_storage_may_be_seen_so_often_and_no_more():
    whole = torch.zeros(100)
    assert len(read_tensors(saved([whole.view(100) for _ in range(VIEWS)]))) == VIEWS
    with pytest.raises(Unreadable, match="more than"):
        read_tensors(saved([whole.view(100) for _ in range(VIEWS + 1)]))


def test_the_caller_of_a_damaged_file_gets_no_tensor():
    whole = saved({"a": torch.randn(5)})
    for length in range(0, len(whole), 7):
        with pytest.raises(Unreadable):
            read_tensors(whole[:length])


def test_a_vector_has_to_have_the_shape_that_it_had():
    here = torch.zeros(3, dtype=torch.float64)
    assert like(torch.ones(3), here, "start").dtype == torch.float64
    for odd in (torch.ones(4), torch.full((3,), torch.inf), [1.0, 1.0, 1.0], None):
        with pytest.raises(Unreadable, match="start"):
            like(odd, here, "start")
