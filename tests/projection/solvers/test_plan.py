"""The choice of a method: right where the answer is evident, explicit, logged."""

import logging
import math

import pytest

from nsrl.projection.solvers.plan import METHODS, Plan, free_memory, largest_sketch, plan

GIB = 2.0**30


@pytest.mark.parametrize(
    "shape,memory,expected",
    [
        ((200_000, 500), 8 * GIB, "primal"),  # P << k
        ((20_000, 5_000), 8 * GIB, "primal"),
        ((20_000, 5_000), 64 * GIB, "primal"),  # the Gram matrix would fit, but takes 60 times longer
        ((1_000, 100_000), 8 * GIB, "dual"),  # k moderate
        ((256, 10**8), 8 * GIB, "dual"),
        ((1, 10), GIB, "dual"),
        ((10, 1), GIB, "primal"),
        ((100_000, 10**6), 8 * GIB, "nystrom"),  # K alone is 80 GB
        ((100_000, 50_000), 8 * GIB, "nystrom"),
        ((5_000, 6_000), 0.01 * GIB, "nystrom"),
    ],
)
@pytest.mark.parametrize("spectral", [True, False])
def test_evident_choices(shape, memory, expected, spectral):
    assert plan(shape, memory=memory, spectral=spectral).method == expected


def test_costs_of_known_shapes():
    """Leading terms by hand: a dense Gram, 9 n^3 for eigh, four matrices of float64."""
    costs = plan((1000, 4000), memory=GIB).costs
    assert tuple(costs) == METHODS
    assert costs["dual"].flops == pytest.approx(2 * 1000**2 * 4000 + 9 * 1000**3)
    assert costs["dual"].bytes == pytest.approx(4 * 8 * 1000**2)
    assert costs["primal"].flops == pytest.approx(2 * 4000**2 * 1000 + 9 * 4000**3)
    assert plan((1000, 4000), memory=GIB, spectral=False).costs["dual"].seconds < costs["dual"].seconds
    cheap, dear = (plan((1000, 4000), memory=GIB, effective_dimension=d).costs["nystrom"] for d in (5, 500))
    assert cheap.flops < dear.flops and cheap.bytes < dear.bytes


def test_a_known_effective_dimension_is_spoken_of():
    assert "many iterations" in plan((10**5, 10**6), memory=GIB, effective_dimension=5e4).reason
    assert "many iterations" not in plan((10**5, 10**6), memory=GIB, effective_dimension=50).reason


@pytest.mark.parametrize("method", METHODS)
def test_the_user_decides(method):
    chosen = plan((10**5, 10**5), memory=1.0, method=method)
    assert (chosen.method, chosen.reason) == (method, "as asked for")


def test_a_single_method_is_taken():
    assert plan((10**5, 10**5), memory=1.0, methods=("dual",)).method == "dual"


def test_nothing_fits():
    with pytest.raises(ValueError, match=r"50000 x 100000 Jacobian needs 74\.5 GiB .*fewer states"):
        plan((50_000, 100_000), memory=GIB, methods=("dual", "primal"))


@pytest.mark.parametrize("wrong", [{"method": "cholesky"}, {"methods": ("dual", "qr")}, {"methods": ()}])
def test_unknown_methods(wrong):
    with pytest.raises(ValueError, match="the methods are dual, primal, nystrom"):
        plan((3, 4), **wrong)


def test_one_readable_line():
    line = str(plan((1000, 4000), memory=GIB))
    assert line.startswith("dual: the cheapest exact method within 1 GiB (dual 0.0298 GiB ")
    assert "primal" in line and "nystrom" in line and "\n" not in line


def test_logged_once_loudly(caplog):
    shape = (123, 45678)
    with caplog.at_level(logging.DEBUG, logger="nsrl.projection"):
        for _ in range(3):
            plan(shape, memory=GIB)
        plan(shape, memory=GIB, method="primal")
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.INFO, logging.DEBUG, logging.DEBUG, logging.INFO]
    assert caplog.messages[0].startswith("123 x 45678 Jacobian, dual: the cheapest exact method")


def test_free_memory():
    assert 2**20 < free_memory() < 2**60


@pytest.mark.parametrize("windows", [False, True])
def test_free_memory_without_proc(monkeypatch, windows):
    """macOS has no /proc, Windows no sysconf."""

    def missing(*args: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    if windows:
        monkeypatch.delattr("os.sysconf")
    assert free_memory() == math.inf if windows else 2**20 < free_memory() < 2**60


def test_default_memory_is_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr("nsrl.projection.solvers.plan.free_memory", lambda device: 2 * 4 * 8 * 1000.0**2)
    assert plan((1000, 10**6)).method == "dual"
    assert plan((1001, 10**6)).method == "nystrom"


def test_plans_are_values():
    assert isinstance(plan((3, 4), memory=GIB), Plan)
    assert plan((3, 4), memory=GIB) == plan((3, 4), memory=GIB)


def test_sketches_stay_within_the_memory():
    assert largest_sketch(10**5, 8 * GIB) == pytest.approx(8 * GIB / (8 * 8 * 10**5), abs=1)
    assert largest_sketch(10**5, 0.0) == 16
    assert largest_sketch(10, 8 * GIB) == 10
    assert largest_sketch(10, math.inf) == 10
