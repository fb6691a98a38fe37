from __future__ import annotations

import torch

import laplace_kernels
from laplace_lora_fast.cli import doctor
from tests.cli.run import invoke


def test_doctor_names_every_op_and_its_backend(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "…" not in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert torch.__version__ in result.output
    assert "matplotlib" in result.output
    rows = doctor.kernel_rows(torch.device("cpu"), laplace_kernels.explain)
    for op in laplace_kernels.OPS:
        assert op in result.output
        choice = laplace_kernels.explain(op, "cpu", torch.float32)
        serving = [
            r for r in rows if op in r[2].split(", ") and "float32" in r[3].split(", ") and r[1] == "yes"
        ]
        assert [r[0] for r in serving] == [choice.backend]


def test_doctor_puts_one_verdict_in_one_row():
    def explain(op, device, dtype):
        reason = "it cannot" if dtype is torch.float32 else f"it has no {op}"
        return laplace_kernels.dispatch.Choice(op, device, dtype, "reference", "last", {"triton": reason})

    ops = ", ".join(laplace_kernels.OPS)
    assert doctor.kernel_rows(torch.device("cpu"), explain) == [
        ("reference", "yes", ops, "float32, bfloat16", "last"),
        ("triton", "no", ops, "float32", "it cannot"),
        ("triton", "no", ops, "bfloat16", "it has no such op"),
    ]
