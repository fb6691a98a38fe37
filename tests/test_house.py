"""The rules of the house: imports run one way, algebra is numbers alone, one loop, small rooms."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import laplace_lora_fast
from laplace_lora_fast.options import kinds, short_name
from laplace_lora_fast.prior.tuning import Tuning
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.tasks import Task

PACKAGE = Path(laplace_lora_fast.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Floors, lowest first. A module may import what stands on lower floors, and its own room.
FLOORS = [
    ["errors"],
    ["options", "weights", "devices", "progress", "ranks"],
    ["likelihoods"],
    ["structures"],
    ["model"],
    ["tasks"],
    ["fitting"],
    ["prediction"],
    ["sampling"],
    ["prior"],
    ["saving"],
    ["posterior", "evaluation"],
    ["state"],
    ["predictive"],
    ["text"],
    ["laplace"],
    ["data", "baselines"],
    ["integrations"],
    ["demo"],
    ["cli"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, also inside functions, without the package's own name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("laplace_lora_fast"):
            module = node.module.removeprefix("laplace_lora_fast").lstrip(".")
            yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("laplace_lora_fast."):
                    yield alias.name.removeprefix("laplace_lora_fast.")


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_one_way(file: Path) -> None:
    own = name_of(file)
    if own == "":
        return  # the public names, imported on first use
    for module in imports(file):
        target = room(module)
        if target not in FLOOR_OF:  # `from laplace_lora_fast import LaplaceLoRA`
            target = "laplace"
        below = FLOOR_OF[target] < FLOOR_OF[room(own)]
        assert below or target == room(own), f"{own} imports {module}, which stands above it"


def test_the_rooms_have_no_cycles() -> None:
    """Inside a room too: the graph of files can be taken apart from below."""
    modules = {name_of(file) for file in FILES}
    graph = {}
    for file in FILES:
        found = set()
        for target in imports(file):
            while target and target not in modules:
                target = target.rpartition(".")[0]
            if target and target != name_of(file):
                found.add(target)
        graph[name_of(file)] = found
    while graph:
        free = [name for name, needs in graph.items() if not needs & set(graph)]
        assert free, f"a cycle among {sorted(graph)}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("module", ["structures", "likelihoods", "options", "weights"])
def test_algebra_knows_neither_peft_nor_transformers(module: str) -> None:
    code = f"import sys, laplace_lora_fast.{module}; print({{'peft', 'transformers'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def mentions(pattern: str) -> set[str]:
    """Modules whose code, comments and docstrings aside, has the pattern."""
    found = set()
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body[0] = ast.Pass()
        if re.search(pattern, ast.unparse(tree)):
            found.add(name_of(file))
    return found


def test_one_file_imports_peft() -> None:
    assert mentions(r"(from|import) peft") - {"demo.task", "cli.loading", "integrations.lm_eval"} == {
        "model.lora"
    }


def test_one_loop_sends_gradients_back() -> None:
    """demo.task and baselines.by_backprop train an adapter, evaluation.metrics fits a temperature."""
    assert mentions(r"autograd\.(grad|backward)\(") == {"model.gradients"}
    own = mentions(r"\.backward\(") - {"demo.task", "baselines.by_backprop", "evaluation.metrics"}
    assert own == {"model.gradients", "fitting.passes"}
    assert mentions(r"\btap\.(forward|backward)\(") == {"fitting.passes"}


def test_sides_and_their_places_are_known_in_one_file() -> None:
    """saving.fingerprint sums every other number of a weight, which is something else."""
    assert mentions(r"""['"]A['"], ['"]B['"]|['"]AB['"]|\[[01]::2\]|% 2\b""") - {"saving.fingerprint"} == {
        "weights"
    }


def test_structures_are_known_by_name_to_their_plugs_alone() -> None:
    """And to those whose business it is: other libraries' structures, the demo, the command line."""
    kinds_of = {kind.__name__ for kind in kinds(Structure) if kind.__module__.startswith("laplace_lora_fast")}
    names = kinds_of | {short_name(kind) for kind in kinds(Structure)}
    for file in FILES:
        if room(name_of(file)) in ("", "structures", "integrations", "baselines", "demo", "cli"):
            continue
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        used |= {
            node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not used & names - {"rows"}, f"{name_of(file)} knows {used & names}"  # rows of a matrix


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


def test_no_folder_is_flat() -> None:
    for folder in {file.parent for file in FILES}:
        assert len(list(folder.glob("*.py"))) <= 13, folder  # twelve rooms and the door


def test_constructors_are_small() -> None:
    public = [getattr(laplace_lora_fast, name) for name in laplace_lora_fast.__all__]
    classes = [kind for kind in public if inspect.isclass(kind) and not issubclass(kind, Exception)]
    assert len(classes) >= 12
    for kind in classes:
        assert len(inspect.signature(kind).parameters) <= 10, kind


@pytest.mark.parametrize("base", [Task, Structure, Tuning])
def test_every_plug_is_public(base: type) -> None:
    for kind in kinds(base):
        if kind.__module__.startswith("laplace_lora_fast"):
            assert getattr(laplace_lora_fast, kind.__name__) is kind
