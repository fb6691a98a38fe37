"""Full fp32 within an op; and the process finds its settings as it left them."""

from __future__ import annotations

import threading

import pytest
import torch

import laplace_kernels as lk
from laplace_kernels import dispatch
from laplace_kernels.precision import FULL_PRECISION


def settings():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


def legacy(precision):
    return lambda: torch.set_float32_matmul_precision(precision)


def of_cuda():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def of_oneDNN():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def of_all():
    torch.backends.fp32_precision = "tf32"


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture
def seen(monkeypatch):
    """The settings that a kernel finds."""
    found = []
    monkeypatch.setattr(dispatch, "_backends", dict(dispatch._backends))
    lk.register_backend(lk.Backend("watching", lambda op, device, dtype: ""))
    lk.register_kernel("watching", "gram_", lambda *args: found.append(settings()))
    yield found
    monkeypatch.undo()
    dispatch.reconsider()


FULL = ("ieee", "none")


@pytest.mark.parametrize(
    "allow", [legacy("high"), legacy("medium"), of_cuda, of_oneDNN, of_all, lambda: None]
)
def test_no_kernel_sees_less_and_the_settings_come_back(seen, allow):
    allow()
    before = settings()
    lk.gram_(torch.zeros(2, 2), torch.ones(3, 2))
    torch.compile(lk.gram_, backend="eager", fullgraph=True)(torch.zeros(2, 2), torch.ones(3, 2))
    assert len(seen) == 2
    assert all(setting in FULL for found in seen for setting in found)
    assert settings() == before


def test_a_setting_that_was_inherited_still_is():
    of_all()
    with FULL_PRECISION:
        pass
    torch.backends.fp32_precision = "ieee"
    assert settings() == ("ieee", "ieee")


def test_the_settings_come_back_after_an_error():
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(KeyError), FULL_PRECISION, FULL_PRECISION:
        raise KeyError
    assert torch.get_float32_matmul_precision() == "medium"


def test_what_is_set_meanwhile_stays():
    torch.set_float32_matmul_precision("medium")
    with FULL_PRECISION:
        torch.set_float32_matmul_precision("high")
        with FULL_PRECISION:
            assert all(setting in FULL for setting in settings())
        assert all(setting in FULL for setting in settings())
    assert torch.get_float32_matmul_precision() == "high"


def test_the_last_thread_to_leave_puts_the_settings_back():
    torch.set_float32_matmul_precision("medium")
    entered, leave = threading.Event(), threading.Event()

    def other():
        with FULL_PRECISION:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with FULL_PRECISION:
        thread.start()
        entered.wait()
    assert all(setting in FULL for setting in settings())
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == "medium"
