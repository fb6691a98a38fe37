"""The package's own namespace, its progress bars, and what results say about their origin."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import laplace_lora_fast
from laplace_lora_fast import progress
from laplace_lora_fast.evaluation import provenance


def test_every_export_is_there_on_first_use():
    for name in laplace_lora_fast.__all__:
        exported = getattr(laplace_lora_fast, name)
        assert exported.__name__ == name
        assert exported is getattr(importlib.import_module(exported.__module__), name)
    assert set(laplace_lora_fast.__all__) <= set(dir(laplace_lora_fast))
    with pytest.raises(AttributeError, match="no attribute 'LaplaceLora'"):
        _ = laplace_lora_fast.LaplaceLora
    code = "from laplace_lora_fast import *; LaplaceLoRA, LaplaceWarning"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_short_names_need_no_import_of_their_objects():
    code = """if True:
        from laplace_lora_fast import LaplaceLoRA
        from laplace_lora_fast.options import named
        from laplace_lora_fast.prior.tuning import Tuning
        print(named("tuning", "leave_one_out", Tuning), named("tuning", "evidence", Tuning))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LeaveOneOut" in done.stdout


def test_the_package_imports_nothing_heavy():
    code = "import sys, laplace_lora_fast; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_entry_point_is_there():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()  # Python 3.10 reads no TOML
    ((module, name),) = re.findall(r'^laplace-lora = "(.+):(.+)"$', project, flags=re.M)
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(("terminal", "notebook"), [(False, False), (True, False), (False, True)])
def test_bars_are_drawn_where_somebody_watches(monkeypatch, capsys, terminal, notebook):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert list(progress.track([1, 2], "work", True)) == [1, 2]
    assert ("work" in capsys.readouterr().err) == (terminal or notebook)
    assert list(progress.track([1, 2], "work", False)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_results_say_where_they_come_from(monkeypatch):
    found = provenance.provenance(("torch", "no-such-package"))
    assert found["versions"] == {"torch": torch.__version__}
    assert found["machine"]
    assert found["threads"] == torch.get_num_threads()
    assert found["commit"] is None or len(found["commit"].split()[0]) == 40


def test_an_installed_copy_names_no_commit(monkeypatch, tmp_path):
    """Not even when it lies within somebody else's repository."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    (tmp_path / "provenance.py").write_text("")
    assert provenance.commit() is None
