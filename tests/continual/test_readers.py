"""Readers of the users' files: tiny files of the same formats, byte by byte, and what is said of wrong ones."""

import gzip
import struct
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nsrl.continual.benchmarks import Minibatches, build_benchmark
from nsrl.continual.benchmarks.installation import find_collection, install
from nsrl.continual.benchmarks.mnist import FILES, MNIST
from nsrl.continual.config import (
    BenchmarkSettings,
    ContinualConfig,
    ModelSettings,
    StrategySettings,
    TrainingSettings,
)
from nsrl.continual.models import build_model
from nsrl.continual.runner import run_continual
from nsrl.errors import NsrlError


def write_idx(path, values):
    content = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist(tmp_path):
    """40 training and 20 test images of 6 x 5 pixels; training files compressed, test files not."""
    draw = np.random.default_rng(0)
    for prefix, count, suffix in (("train", 40, ".gz"), ("t10k", 20, "")):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = draw.integers(0, 256, (count, 6, 5), dtype=np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    return tmp_path


@pytest.fixture
def cifar(tmp_path):
    """Two training and one test record of each of the 100 classes, in the folder that the archive unpacks to."""
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, each in (("train", 2), ("test", 1)):
        fine = np.tile(np.arange(100, dtype=np.uint8), each)
        pixels = draw.integers(0, 256, (len(fine), 3072), dtype=np.uint8)
        records = np.concatenate([(fine // 5)[:, None], fine[:, None], pixels], 1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path


@pytest.fixture
def tinyimagenet(tmp_path):
    """Four classes, three training images and one labelled validation image each; one image is grey."""
    folder = tmp_path / "tiny-imagenet-200"
    names = ["n02", "n01", "n04", "n03"]
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    rows = []
    for label, name in enumerate(names):
        images = folder / "train" / name / "images"
        images.mkdir(parents=True)
        for number in range(3):
            grey = label == 0 and number == 0
            colour = 50 * label if grey else (50 * label, 10 * number, 200)
            Image.new("L" if grey else "RGB", (64, 64), colour).save(images / f"{name}_{number}.JPEG", quality=95)
        Image.new("RGB", (64, 64), (50 * label, 0, 200)).save(folder / "val" / "images" / f"val_{label}.png")
        rows.append(f"val_{label}.png\t{name}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(reversed(rows)) + "\n")
    return tmp_path


def run(benchmark, **model):
    training = TrainingSettings(epochs=1, batch_size=16, augment=model.get("kind") == "resnet18")
    return run_continual(ContinualConfig(benchmark, ModelSettings(**model), training, StrategySettings("naive")))


def test_permuted_mnist_end_to_end(mnist):
    settings = BenchmarkSettings("permuted_mnist", tasks=2, validation=0.25, data=str(mnist))
    benchmark = build_benchmark(settings)
    first = benchmark.tasks[0].splits
    assert (len(first.train), len(first.validation), len(first.test)) == (30, 10, 20)
    images = np.frombuffer((mnist / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(20, 30)
    np.testing.assert_array_equal(first.test.inputs.numpy(), images)
    inputs, _, _ = next(iter(benchmark.loader(1, "test")))
    np.testing.assert_allclose(np.sort(inputs.numpy()), np.sort(images / 255.0), rtol=1e-6)
    metrics = run(settings, hidden=[8])
    assert np.shape(metrics["matrix"]) == (2, 2)


@pytest.mark.parametrize(
    ("collection", "mean", "deviation"), [("mnist", 0.1307, 0.3081), ("fashion_mnist", 0.2860, 0.3530)]
)
def test_split_mnist_and_standardised_pixels(collection, mean, deviation, mnist):
    settings = BenchmarkSettings(f"split_{collection}", validation=0.0, data=str(mnist), pixels="standardised")
    content = np.frombuffer((mnist / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(20, 30)
    for scenario in ("task", "class"):
        benchmark = build_benchmark(replace(settings, scenario=scenario))
        assert [data.task.classes for data in benchmark.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
        assert [data.task.head for data in benchmark.tasks] == ([0, 1, 2, 3, 4] if scenario == "task" else [None] * 5)
        inputs, targets, _ = next(iter(benchmark.loader(3, "test")))
        assert targets.tolist() == ([0, 1, 0, 1] if scenario == "task" else [6, 7, 6, 7])
        wanted = (content[[6, 7, 16, 17]] / 255.0 - mean) / deviation
        np.testing.assert_allclose(inputs.numpy(), wanted, rtol=1e-5, atol=1e-6)
        assert run(replace(settings, scenario=scenario), hidden=[8])["scenario"] == scenario


def test_a_network_without_biases_has_none(mnist):
    for name in ("permuted_mnist", "split_mnist"):
        benchmark = build_benchmark(BenchmarkSettings(name, data=str(mnist)))
        for bias in (False, True):
            model = build_model(ModelSettings(hidden=[8], bias=bias), benchmark)
            assert any(key.endswith("bias") for key, _ in model.named_parameters()) == bias


def test_batches_are_the_same_however_many_are_gathered_at_once(mnist, monkeypatch):
    benchmark = build_benchmark(BenchmarkSettings("permuted_mnist", tasks=2, data=str(mnist)))
    found = []
    for gathered in (1, 7, 2048):
        monkeypatch.setattr(Minibatches, "GATHERED", gathered)
        loader = benchmark.loader(1, batch_size=5, seed=3)
        found.append([*loader, *loader])
    assert [len(targets) for _, targets, _ in found[0]] == [5] * 2 * len(loader)
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1])


def test_installed_files_are_those_of_the_folder_or_archive(mnist, tmp_path):
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as content:
        for path in sorted(mnist.glob("*ubyte*")):
            content.add(path, arcname=f"package/data/{path.name}")
    for source in (mnist, archive):
        folder = tmp_path / f"installed {source.name}"
        assert install(MNIST, source, folder) == {"train": 40, "t10k": 20}
        for name in FILES:
            (mine,) = folder.glob(f"{name}*")
            assert mine.read_bytes() == (mnist / mine.name).read_bytes()


def test_what_cannot_be_installed_is_told(mnist, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(NsrlError, match="no t10k-labels-idx1-ubyte in it; MNIST is the four files"):
        install(MNIST, mnist, elsewhere)
    write_idx(mnist / "t10k-labels-idx1-ubyte", np.full(20, 10, dtype=np.uint8))
    with pytest.raises(NsrlError, match="label 10, but MNIST's are 0 to 9"):
        install(MNIST, mnist, elsewhere)
    with pytest.raises(NsrlError, match="no tar archive"):
        install(MNIST, mnist / "t10k-labels-idx1-ubyte", elsewhere)
    with pytest.raises(NsrlError, match="there is no "):
        install(MNIST, tmp_path / "nowhere", elsewhere)
    with pytest.raises(NsrlError, match="did you mean mnist"):
        find_collection("mnst")


def test_split_cifar100_end_to_end(cifar):
    settings = BenchmarkSettings("split_cifar100", tasks=50, validation=0.0, data=str(cifar))
    benchmark = build_benchmark(settings)
    content = (cifar / "cifar-100-binary" / "test.bin").read_bytes()
    for index in (0, 49):
        data = benchmark.tasks[index]
        assert data.task.classes == (2 * index, 2 * index + 1)
        assert (len(data.splits.train), data.splits.test.targets.tolist()) == (4, [0, 1])
        at = 3074 * 2 * index + 2
        # red plane first, row by row
        assert bytes(data.splits.test.inputs[0].flatten().tolist()) == content[at : at + 3072]
    inputs, _, _ = next(iter(benchmark.loader(0, "test")))
    red = content[2] / 255.0
    assert float(inputs[0, 0, 0, 0]) == pytest.approx((red - 0.5071) / 0.2675, rel=1e-5)
    halves = BenchmarkSettings("split_cifar100", tasks=2, validation=0.4, data=str(cifar))
    metrics = run(halves, kind="resnet18", width=2)
    assert np.shape(metrics["matrix"]) == (2, 2) and metrics["scenario"] == "task"


def test_split_tinyimagenet_end_to_end(tinyimagenet):
    settings = BenchmarkSettings("split_tinyimagenet", tasks=2, validation=0.0, data=str(tinyimagenet))
    benchmark = build_benchmark(settings)
    for index, data in enumerate(benchmark.tasks):
        assert data.splits.train.inputs.shape == (6, 3, 64, 64)
        tested = data.splits.test
        # the annotations name the classes, in whatever order; the red channel carries the label
        assert (tested.inputs[:, 0, 0, 0] // 50).tolist() == (tested.targets + 2 * index).tolist()
        trained = data.splits.train
        assert torch.equal((trained.inputs[:, 0, 9, 9].float() / 50).round().long(), trained.targets + 2 * index)
    assert torch.equal(*benchmark.tasks[0].splits.train.inputs[0, :2])  # grey
    metrics = run(settings, kind="resnet18", width=2, batch_norm="affine")
    assert np.shape(metrics["matrix"]) == (2, 2)


@pytest.mark.parametrize(
    ("name", "download"),
    [
        ("permuted_mnist", "train-images-idx3-ubyte"),
        ("split_fashion_mnist", "dataset-fashion-mnist"),
        ("split_cifar100", "cifar-100-binary.tar.gz"),
        ("split_tinyimagenet", "tiny-imagenet-200.zip"),
    ],
)
def test_a_missing_folder_says_what_to_download_and_where_to_put_it(name, download, tmp_path):
    with pytest.raises(NsrlError, match=download) as told:
        build_benchmark(BenchmarkSettings(name, data=str(tmp_path / "nowhere")))
    assert str(tmp_path / "nowhere") in str(told.value) and str(told.value).count(". ") == 0
    with pytest.raises(NsrlError, match=r"--benchmark\.data"):
        build_benchmark(BenchmarkSettings(name))


def test_damaged_files_are_told_apart(mnist, cifar, tinyimagenet):
    def told(name, said):
        with pytest.raises(NsrlError, match=said):
            build_benchmark(BenchmarkSettings(name, data=str(mnist)))

    images = mnist / "t10k-images-idx3-ubyte"
    content = images.read_bytes()
    images.write_bytes(content[:-7])
    told("permuted_mnist", "should hold 600 bytes but holds 593")
    images.write_bytes(b"\x80\x04" + content[2:])
    told("permuted_mnist", "not an idx file")
    images.unlink()
    told("permuted_mnist", "t10k-images-idx3-ubyte is missing")
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b nothing")
    told("permuted_mnist", "cannot be read")
    train = cifar / "cifar-100-binary" / "train.bin"
    records = train.read_bytes()
    train.write_bytes(records[:-1])
    told("split_cifar100", "records of 3074 bytes")
    train.write_bytes(records[:1] + b"\xff" + records[2:])
    told("split_cifar100", "label 255")
    folder = tinyimagenet / "tiny-imagenet-200"
    (folder / "train" / "n03" / "images" / "n03_1.JPEG").write_bytes(b"no image")
    told("split_tinyimagenet", "n03_1.JPEG cannot be read")
    Image.new("RGB", (32, 64)).save(folder / "train" / "n03" / "images" / "n03_1.JPEG")
    told("split_tinyimagenet", "32 x 64 pixels")


def test_the_reader_survives_no_pickle(tmp_path):
    """The python version of CIFAR-100 is a pickle: it is not opened, whatever it is called."""
    (tmp_path / "train").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(NsrlError, match="binary version"):
        build_benchmark(BenchmarkSettings("split_cifar100", data=str(tmp_path)))
