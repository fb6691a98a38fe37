"""The pages build, what they name is there, and their code runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import laplace_kernels
import laplace_lora_fast
from bench.docs import rendered
from bench.protocols.config import read
from bench.protocols.plan import lines
from laplace_lora_fast.cli.plan import Setting, plan
from laplace_lora_fast.fitting.planner import Rates
from tests.processes import run_script

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
PACKAGE = ROOT / "python" / "laplace_lora_fast"
BASES = ROOT, PACKAGE, PACKAGE.parent
CODE = dict(  # title of a section "Add a .." -> its first block of code
    re.findall(
        r"^## Add an? ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```",
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        flags=re.S | re.M,
    )
)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`([\w./]+(?:\.(?:py|md|txt|cff|cpp)|/))`", text)
    assert [name for name in named if not any((base / name).exists() for base in BASES)] == []


def test_plans_on_pages_are_what_the_planner_says(tmp_path: Path) -> None:
    """Rows of their tables, however they are laid out."""
    protocol = read(ROOT / "bench" / "protocols" / "configs" / "arc_easy.toml")
    (tmp_path / "config.json").write_text(json.dumps(protocol.shape))
    rates = Rates(3e14, 1e13)
    of_llama = plan(Setting(tmp_path, "all-linear", 16, 10_000, 5, 256, 4 * 2**30), rates)
    planned = {
        "protocols.md": list(lines(protocol, None, 4 * 2**30, rates)),
        "planning.md": ["  ".join(row) for row in of_llama.rows],
    }
    for page, rows in planned.items():
        text = (ROOT / "docs" / "guide" / page).read_text(encoding="utf-8")
        shown = {" ".join(line.split()) for line in text.splitlines()}
        structures = [" ".join(row.split()) for row in rows if "iB " in row and ";" not in row]
        assert len(structures) > 4
        assert [row for row in structures if row not in shown] == [], page


def test_every_room_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")]
    rooms += [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert [room for room in rooms if f"`{room}`" not in text] == []


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    names = {*laplace_lora_fast.__all__, *laplace_kernels.__all__} - {"OPS"}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", text)] == []


def test_figures_are_those_of_the_results() -> None:
    page = ROOT / "docs" / "benchmarks.md"
    assert page.read_text(encoding="utf-8") == rendered("docs/benchmarks.md"), "run python -m bench.docs"


# What makes use of each skeleton of CONTRIBUTING.md.
FIT = """
import warnings; warnings.simplefilter("ignore")
import tempfile, torch
from laplace_lora_fast import Answers, HeldOut, LaplaceLoRA, Outputs
from tests import tiny
def fit(task=Answers(tiny.ANSWERS), model=tiny.tiny_llama(), labels=None, **options):
    batch = tiny.batch(8, length=6) | ({} if labels is None else {"labels": labels})
    la = LaplaceLoRA(model, task, **options).fit([batch], progress=False)
    la.optimize_prior_precision(HeldOut([batch], grid=(0.1, 1, 10)), progress=False)
    return la, la.predict(batch)
"""
USES = {
    "structure": """
la, probs = fit(structure="isotropic")
with tempfile.TemporaryDirectory() as folder:
    la.save(folder)
    assert LaplaceLoRA.load(folder, la.model).structure == Isotropic()
assert probs.shape == (8, 3) and la.posterior.sample(2, torch.Generator())
""",
    "task": """
_, probs = fit(Binary(), tiny.tiny_llama_classifier(1), torch.arange(8) % 2)
assert probs.shape == (8, 2)
""",
    "likelihood": """
counts = Outputs(lambda output, batch: output.logits[:, -1, :2], Poisson())
la, rates = fit(counts, labels=torch.arange(16).view(8, 2))
batch = tiny.batch(8, length=6)
with torch.no_grad():
    assert (rates > la.model(batch["input_ids"], batch["attention_mask"]).logits[:, -1, :2].exp()).all()
""",
    "link": """
from laplace_lora_fast.likelihoods.links import probabilities
mean = torch.tensor([[1.0, 2.0]])
expected = torch.tensor([[0.0, 1.0, 2.0]]).softmax(1)
assert torch.equal(probabilities("plug_in", mean, torch.eye(2)[None], 1, torch.Generator()), expected)
""",
    "way of tuning": """
la, _ = fit()
la.optimize_prior_precision(Determined(parameters=5.0))
assert abs(float(la.posterior.effective_parameters().sum()) - 5.0) < 1e-6
""",
    "op": """
from laplace_kernels import OPS, call
X = torch.randn(5, 3)
assert torch.equal(call(OP, X, torch.arange(5) > 1), X[2:].square().sum(0)) and "column_norms" in OPS
torch.library.opcheck(torch.ops.laplace_kernels.column_norms.default, (X, None))
""",
    "kernel": """
X, C, expected = torch.randn(5, 3), torch.zeros(3, 3), torch.zeros(3, 3)
lk.gram_(expected, X)
assert lk.explain("gram_").backend == "reference"
with lk.use_backend("mine"):
    lk.gram_(C, X)
assert torch.allclose(C, X.T @ X) and torch.allclose(C.tril(), expected.tril())
""",
}


def test_every_skeleton_is_used() -> None:
    assert CODE.keys() == USES.keys()


@pytest.mark.parametrize("title", USES)
def test_skeletons_of_contributing_run(title: str, tmp_path: Path) -> None:
    script = tmp_path / "skeleton.py"
    script.write_text(CODE[title] + FIT + USES[title], encoding="utf-8")
    failed = run_script(script)
    assert not failed, failed
