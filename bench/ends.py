"""What the end of a fit asks of a GPU's libraries, counted without a GPU: `python -m bench.ends`.

After the last batch rows become one matrix a weight, in fp16, and their inner products and a factorisation of those are
what a prior takes; Kronecker factors become eigenvalues and vectors. These steps are taken for Llama-2-7B on torch's
meta device: it runs nothing but says which operations would run, with which operands.

Operands and results count once for each operation. What a factorisation moves within itself is not known; operations
are counted by the formulas of Golub and Van Loan (2013): 2 m n k for a product, 9 n^3 for an eigenproblem with vectors,
n^3 / 3 for a Cholesky factor, n^2 k for a triangular system, 4 m n^2 - 4 n^3 / 3 for a QR factorisation with its Q.
Nothing here is a time.

Writes bench/results/ends.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.traffic import META, RANK, SHAPES, Meter
from laplace_lora_fast.structures.blocks import factors, spectrum
from laplace_lora_fast.structures.blocks.factors import DenseFactor, Factor
from laplace_lora_fast.structures.rows.kernels import RowKernels
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.sketches import sketch
from laplace_lora_fast.structures.rows.solver import one_solver, shared_solvers
from laplace_lora_fast.structures.rows.store import RowStore

RESULTS = Path(__file__).parent / "results"
FACTORISATIONS = ("linalg_eigh", "_linalg_eigh", "linalg_qr", "linalg_cholesky_ex", "linalg_solve_triangular")
SHAPE = SHAPES["Llama-2-7B"]
WIDTH, MLP, LAYERS = (SHAPE[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
# Of a decoder layer: widths of lora_A and lora_B, and of distinct inputs and of gradients.
WEIGHTS = {"q, v": [WIDTH] * 4, "all linear": [WIDTH] * 12 + [MLP, MLP]}
FACTORS = {"q, v": [WIDTH] * 3, "all linear": [WIDTH] * 7 + [MLP] * 4}
EXAMPLES, BATCH, COLUMNS = 1000, 8, 128
PRIOR = "rows: a prior"


@dataclass(frozen=True)
class Count:
    """Of one step.

    Attributes:
        calls: of operations that launch something.
        factorisations: among them.
        bytes: operands and results.
        flops: of products and factorisations.
    """

    calls: int
    factorisations: int
    bytes: int
    flops: int


class LibraryMeter(Meter):
    """Counts what products and factorisations compute, too."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.seen = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        shapes = [leaf.shape for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        self.flops += _flops(name, shapes)
        self.seen[name] += 1
        return result


def _flops(name: str, shapes: list[torch.Size]) -> int:
    if name in ("mm", "bmm"):
        return 2 * shapes[0].numel() * shapes[1][-1]
    if name in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
        return 2 * shapes[1].numel() * shapes[2][-1]
    if name not in FACTORISATIONS:
        return 0
    *many, m, n = shapes[0]
    count = torch.Size(many).numel()
    if name == "linalg_qr":
        return count * (4 * m * n**2 - 4 * n**3 // 3)
    if name == "linalg_cholesky_ex":
        return count * n**3 // 3
    return count * (n**2 * shapes[1][-1] if name == "linalg_solve_triangular" else 9 * n**3)


def count(step: Callable[[], object]) -> Count:
    """What a step asks for. Values that it reads are taken to be as they are in a sound fit."""
    everything = {"create": True, "new": lambda values: WIDTH}  # no eigenvalue is noise
    with (
        LibraryMeter() as meter,
        mock.patch.object(factors, "int", **everything),
        mock.patch.object(spectrum, "int", **everything),
        mock.patch.object(sketch, "_norms", lambda tensors, order: [1.0] * len(tensors)),
        mock.patch.object(sketch, "_SMALLEST", 0.0),
    ):
        step()
    factorised = sum(meter.seen[name] for name in FACTORISATIONS)
    return Count(sum(meter.launches.values()), factorised, meter.bytes, meter.flops)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def steps(targets: str) -> dict[str, Count]:
    """The ends of fits of rows and of KFAC."""
    widths = WEIGHTS[targets] * LAYERS
    omegas = [empty(width, COLUMNS, dtype=torch.bfloat16) for width in widths]
    rows = [empty(EXAMPLES, RANK * COLUMNS, dtype=torch.float16) for _ in widths]
    found = {"rows: one matrix a weight, in fp16": count(lambda: _joined(omegas))}
    kernel = empty(EXAMPLES, EXAMPLES, dtype=torch.float64)
    found["rows: their inner products"] = count(lambda: RowKernels(rows, omegas).total([1.0] * len(rows)))
    roots = BlockDiagonal(Layout(torch.ones(EXAMPLES)), [empty(EXAMPLES, 1, 1, dtype=torch.float64)])
    ones = torch.ones(1, 1, dtype=torch.float64)
    found[PRIOR] = count(lambda: one_solver(kernel[None], roots, ones[0]))
    found["rows: 10 priors, of tuning"] = count(
        lambda: list(shared_solvers(kernel[None], roots, ones.expand(1, 10)))
    )
    for text, n in (("fewer examples than half a width", EXAMPLES), ("more", 10**6)):
        found[f"KFAC: factors of {n:,} examples ({text})"] = count(lambda n=n: _factors(targets, n))  # type: ignore[misc]
    return found


def _joined(omegas: list[Tensor]) -> None:
    store = RowStore(len(omegas), 1 << 60)
    for _ in range(EXAMPLES // BATCH):
        store.extend([empty(BATCH, RANK * COLUMNS) for _ in omegas])
    sketch.in_16_bits(store.matrices(), omegas, store.kept)


def _factors(targets: str, n: int) -> None:
    for width in FACTORS[targets] * LAYERS:
        factor: Factor = DenseFactor(width, torch.float32, META)
        if n > width // 2:
            factor._restore_own({"lower": empty(width, width)})
        else:
            factor._waiting.restore(empty(n, width), n)
        factor.spectrum(None)
        factor.quadratic(empty(width, RANK, dtype=torch.float64))


def markdown(found: dict[str, dict[str, Count]]) -> str:
    """The table."""
    lines = [
        "# What the end of a fit asks of a GPU's libraries",
        "",
        f"Counted on torch's meta device (torch {torch.__version__}) by `python -m bench.ends`; nothing here was",
        f"run or timed. Llama-2-7B, LoRA of rank {RANK}, {EXAMPLES:,} examples of two classes where nothing else is",
        f"said, {COLUMNS} columns a weight. Calls are operations that launch something; a factorisation is many",
        "kernels in one call. Bytes are operands and results of each call, not what a factorisation moves within;",
        "operations are products and factorisations by textbook formulas. All but the first step is in fp64.",
        "",
        "| LoRA on | step | calls | factorisations | operands, GB | TFLOP |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for targets, of_steps in found.items():
        for step, each in of_steps.items():
            lines.append(
                f"| {targets} | {step} | {each.calls:,} | {each.factorisations} | {each.bytes / 1e9:.3g} "
                f"| {each.flops / 1e12:.3g} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    folder = parser.parse_args().output
    found = {targets: steps(targets) for targets in WEIGHTS}
    records = {
        targets: {step: asdict(each) for step, each in of_steps.items()}
        for targets, of_steps in found.items()
    }
    (folder / "ends.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    (folder / "ends.md").write_text(markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main()
