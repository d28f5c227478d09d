"""Exact float32 is borrowed: inside the block nothing rounds to TF32 or bfloat16, outside nothing has changed."""

import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch

from nsrl.projection.precision import full_precision

NEW = hasattr(torch._C, "_get_fp32_precision_getter")
new_switches = pytest.mark.skipif(not NEW, reason="torch before 2.9 has no fp32_precision")
SWITCHES = [("generic", "all"), *itertools.product(("cuda", "mkldnn"), ("all", "matmul", "conv", "rnn"))]


def read(switch: tuple[str, str]) -> str:
    return torch._C._get_fp32_precision_getter(*switch)


def write(switch: tuple[str, str], value: str) -> None:
    torch._C._set_fp32_precision_setter(*switch, value)


def state() -> dict[str, object]:
    """Everything that can be asked for, refusals included."""
    answers: dict[str, object] = {"/".join(switch): read(switch) for switch in SWITCHES} if NEW else {}
    questions = {
        "precision": torch.get_float32_matmul_precision,
        "cublas": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cudnn": lambda: torch.backends.cudnn.allow_tf32,
        "cpu": lambda: torch.is_autocast_enabled("cpu"),
        "cuda": lambda: torch.is_autocast_enabled("cuda"),
    }
    for name, question in questions.items():
        try:
            answers[name] = question()
        except RuntimeError:
            answers[name] = "refused"
    return answers


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave the process as it was, whatever the test or a broken `full_precision` did."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    saved = [(switch, read(switch)) for switch in SWITCHES] if NEW else []
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = cudnn
    for switch, value in saved:
        write(switch, value)


def legacy() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def inherited() -> None:
    write(("generic", "all"), "tf32")


def own() -> None:
    write(("cuda", "matmul"), "tf32")
    write(("mkldnn", "matmul"), "bf16")
    write(("cuda", "rnn"), "ieee")


def mixed() -> None:
    legacy()
    inherited()
    own()


USERS = [legacy, medium] + ([inherited, own, mixed] if NEW else [])
every_user = pytest.mark.parametrize("user", USERS)


@every_user
def test_the_settings_come_back(user):
    user()
    before = state()
    with full_precision():
        pass
    assert state() == before


@every_user
def test_the_settings_come_back_after_an_error(user):
    user()
    before = state()
    with pytest.raises(ZeroDivisionError), full_precision(), full_precision():
        1 / 0  # noqa: B018
    assert state() == before


@new_switches
@every_user
def test_nothing_rounds_inside(user):
    user()
    with full_precision():
        assert {read(switch) for switch in SWITCHES if switch[1] != "all"} == {"ieee"}


@pytest.mark.parametrize("user", [legacy, medium])
def test_the_old_switches_can_be_read_inside(user):
    """torch refuses to read them while they disagree with the new ones, and `torch.backends.cudnn.flags` reads them."""
    user()
    with full_precision(), torch.backends.cudnn.flags(enabled=False):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32


@new_switches
def test_what_was_inherited_is_inherited_again():
    """A child that had no value of its own follows its parent still."""
    for switch in SWITCHES:  # torch's old setters, called by whatever ran before, give the children their own values
        write(switch, "none")
    inherited()
    with full_precision():
        pass
    for parent, value in itertools.product([("generic", "all"), ("cuda", "all")], ["ieee", "tf32"]):
        write(parent, value)
        assert read(("cuda", "matmul")) == value


def test_autocast_is_off_inside():
    left = torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision():
            assert (left @ left).dtype == torch.float32
        assert (left @ left).dtype == torch.bfloat16


def test_autocast_on_cuda_is_off_inside():
    torch.set_autocast_enabled("cuda", True)
    try:
        with full_precision():
            assert not torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_as_a_decorator():
    @full_precision()
    def multiply(left: torch.Tensor) -> torch.Tensor:
        return left @ left

    medium()
    before = state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert multiply(torch.randn(3, 3)).dtype == torch.float32
    assert state() == before


@every_user
def test_no_warning(user):
    user()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with full_precision():
            pass


@pytest.mark.cuda
def test_products_on_cuda_are_exact():
    legacy()
    left = torch.randn(512, 512, device="cuda")
    exact = left.double() @ left.double()
    with full_precision():
        careful = left @ left
    assert float((careful - exact).norm() / exact.norm()) < 1e-6 < float((left @ left - exact).norm() / exact.norm())
