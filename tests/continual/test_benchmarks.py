"""Offline benchmarks: what the tasks are, how they are split, and that a seed fixes all of it."""

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from nsrl.continual.benchmarks import Examples, build_benchmark
from nsrl.continual.benchmarks.benchmark import augmented, split_examples
from nsrl.continual.benchmarks.digits import rotate
from nsrl.continual.benchmarks.synthetic import OWN, SHARED, encode, task_subspaces
from nsrl.continual.config import BenchmarkSettings
from nsrl.errors import NsrlError

OFFLINE = ("permuted_digits", "split_digits", "rotated_digits", "teacher_student", "regression")
PARTS = ("train", "validation", "test")


def everything(benchmark, index):
    splits = benchmark.tasks[index].splits
    return torch.cat([getattr(splits, part).inputs for part in PARTS])


@pytest.mark.parametrize("name", OFFLINE)
def test_a_seed_fixes_a_benchmark_and_another_seed_changes_it(name):
    first, again, other = (build_benchmark(BenchmarkSettings(name), seed) for seed in (3, 3, 4))
    for ours, same, changed in zip(first.tasks, again.tasks, other.tasks, strict=True):
        for part in PARTS:
            mine, theirs = getattr(ours.splits, part), getattr(same.splits, part)
            assert torch.equal(mine.inputs, theirs.inputs) and torch.equal(mine.targets, theirs.targets)
        assert not torch.equal(ours.splits.train.inputs, changed.splits.train.inputs)


@pytest.mark.parametrize("name", OFFLINE)
def test_the_order_permutes_the_tasks_and_nothing_else(name):
    natural, permuted = (build_benchmark(BenchmarkSettings(name, order=order), 0) for order in (0, 1))
    names = [data.task.name for data in natural.tasks]
    assert sorted(names) == sorted(data.task.name for data in permuted.tasks)
    assert names != [data.task.name for data in permuted.tasks]
    for index, data in enumerate(permuted.tasks):
        assert data.task.index == index and data.task.head in (None, index)
        same = natural.tasks[names.index(data.task.name)]
        assert torch.equal(data.splits.test.inputs, same.splits.test.inputs)
        assert data.task.classes == same.task.classes


def test_permuted_digits_are_permutations_of_scikit_learns_images():
    benchmark = build_benchmark(BenchmarkSettings("permuted_digits", tasks=3))
    images = load_digits().data / 16.0
    known = {np.sort(image).tobytes() for image in images.astype(np.float32)}
    first, second = everything(benchmark, 0), everything(benchmark, 1)
    assert len(first) == len(images)
    assert {np.sort(image).tobytes() for image in second.numpy()} == known
    assert not torch.equal(first, second)
    # one permutation for the whole task: the pixels' sums are those of the plain task, elsewhere
    torch.testing.assert_close(first.sum(0).sort().values, second.sum(0).sort().values, rtol=1e-5, atol=1e-3)


def test_no_image_is_trained_on_in_one_task_and_tested_in_another():
    benchmark = build_benchmark(BenchmarkSettings("permuted_digits", tasks=4), 5)
    keys = [
        {
            part: {
                (tuple(np.sort(row)), int(label))
                for row, label in zip(
                    getattr(data.splits, part).inputs.numpy(), getattr(data.splits, part).targets, strict=True
                )
            }
            for part in PARTS
        }
        for data in benchmark.tasks
    ]
    for other in keys[1:]:
        assert keys[0] == other


def test_shares_are_drawn_of_every_class_and_no_example_is_lost():
    labels = torch.arange(300) % 3
    splits = split_examples(Examples(torch.arange(300.0)[:, None], labels), 0.1, 0.2, seed=0)
    assert [len(getattr(splits, part)) for part in PARTS] == [210, 30, 60]
    assert torch.bincount(splits.test.targets).tolist() == [20, 20, 20]
    gathered = torch.cat([getattr(splits, part).inputs for part in PARTS])
    assert torch.equal(gathered.flatten().sort().values, torch.arange(300.0))


def test_split_digits_count_labels_within_the_head_or_over_all_classes():
    by_task = build_benchmark(BenchmarkSettings("split_digits"))
    by_class = build_benchmark(BenchmarkSettings("split_digits", scenario="class"))
    assert by_task.head_sizes == (2,) * 5 and by_class.head_sizes is None and by_class.outputs == 10
    for index, (own, shared) in enumerate(zip(by_task.tasks, by_class.tasks, strict=True)):
        assert own.task.classes == shared.task.classes == (2 * index, 2 * index + 1)
        assert (own.task.scenario, shared.task.scenario) == ("task", "class")
        assert own.splits.train.targets.unique().tolist() == [0, 1]
        assert torch.equal(own.splits.train.targets + 2 * index, shared.splits.train.targets)


def test_rotation_agrees_with_an_exact_quarter_turn_and_is_none_at_zero():
    images = torch.rand(3, 64)
    assert torch.equal(rotate(images, 0.0), images)
    np.testing.assert_array_equal(rotate(images, 90.0).reshape(3, 8, 8), np.rot90(images.reshape(3, 8, 8), axes=(1, 2)))
    # the interpolating branch turns the same way
    near = rotate(images, 89.999).reshape(3, 8, 8)
    torch.testing.assert_close(near, rotate(images, 90.0).reshape(3, 8, 8), atol=2e-3, rtol=0)


def test_the_students_null_space_is_known():
    benchmark = build_benchmark(BenchmarkSettings("teacher_student"), 1)
    seen = torch.cat([everything(benchmark, index) for index in range(3)]).double()
    assert int(torch.linalg.matrix_rank(seen, rtol=1e-5)) == SHARED + 3 * OWN
    bases = task_subspaces(5, 1)
    own = torch.cat([basis[:, :OWN] for basis in bases], 1)
    torch.testing.assert_close(own.T @ own, torch.eye(5 * OWN), atol=1e-6, rtol=0)
    assert torch.equal(bases[0][:, OWN:], bases[4][:, OWN:])
    for data in benchmark.tasks:
        assert torch.bincount(data.splits.train.targets, minlength=4).min() > 20


def test_the_pieces_of_the_curve_join():
    benchmark = build_benchmark(BenchmarkSettings("regression"), 0)
    codes = encode(torch.tensor([[0.0], [0.5], [5.0]]), 5)
    assert codes.shape == (3, *benchmark.input_shape)
    assert int(codes[1].argmax()) in (5, 6) and int(codes[2].argmax()) == 59
    joints = []
    for index in range(4):
        left, right = (benchmark.tasks[index + side].splits.train for side in (0, 1))
        # nearest to the joint, as the bump beside it says
        last, first = left.inputs[:, 12 * (index + 1)].argmax(), right.inputs[:, 12 * (index + 1) - 1].argmax()
        joints.append(float((left.targets[last] - right.targets[first]).abs()))
    assert max(joints) < 0.15


def test_minibatches_go_through_everything_anew_shuffled_each_time():
    benchmark = build_benchmark(BenchmarkSettings("split_digits"))
    loader = benchmark.loader(2, batch_size=32, seed=0)
    passes = [list(loader) for _ in range(2)]
    assert len(loader) == len(passes[0]) and {index for _, _, index in passes[0]} == {2}
    first, second = (torch.cat([inputs for inputs, _, _ in batches]) for batches in passes)
    assert not torch.equal(first, second)
    whole = benchmark.tasks[2].splits.train.inputs
    for found in (first, second):
        assert torch.equal(found.sum(1).sort().values, whole.sum(1).sort().values)
    again = torch.cat([inputs for inputs, _, _ in benchmark.loader(2, batch_size=32, seed=0)])
    assert torch.equal(first, again)


def test_augmented_images_are_shifted_and_mirrored_copies():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    found = augmented(images, torch.Generator().manual_seed(0), padding=2)
    assert found.is_contiguous()
    padded = torch.nn.functional.pad(images, (2,) * 4)
    mirrored = 0
    for image, source in zip(found, padded, strict=True):
        windows = [source[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
        plain = any(torch.equal(image, window) for window in windows)
        turned = any(torch.equal(image, window.flip(2)) for window in windows)
        assert plain or turned
        mirrored += turned
    assert 16 < mirrored < 48


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "permuted_digits", "scenario": "class"}, "same classes"),
        ({"name": "split_digits", "scenario": "domain"}, "different classes"),
        ({"name": "regression", "scenario": "task"}, "its scenario is domain"),
        ({"name": "split_digits", "tasks": 3}, "10 classes cannot be split into 3 tasks"),
        ({"name": "teacher_student", "tasks": 20}, "room for 14 tasks"),
        ({"name": "permuted_digits", "tasks": 0}, "at least 1"),
        ({"name": "permuted_digits", "test": 0.7}, "benchmark.test"),
        ({"name": "mnist"}, "there is no benchmark 'mnist'"),
    ],
)
def test_what_does_not_exist_is_told(settings, said):
    with pytest.raises(NsrlError, match=said):
        build_benchmark(BenchmarkSettings(**settings))


def test_without_scikit_learn_the_digits_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(NsrlError, match=r"pip install nsrl\[analysis\]"):
        build_benchmark(BenchmarkSettings("permuted_digits"))
