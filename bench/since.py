"""Fits, predictions and evidence of this tree and of an older commit, in turns: whether anything has become slower.

Two processes, one with each tree's own packages and benchmarks, take turns job by job and round by round on one thread;
each figure is the median of the rounds' ratios of processor times. `python -m bench.since COMMIT` writes
results/since.json and since.md; with --only it measures some jobs anew. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "bench/results/since.json"
_HOSTS = "laplace-torch", "bayesian-lora"  # run much of others' code


class Worker:
    """A process that runs jobs of one tree when asked.

    Args:
        tree: the checkout.
        size: name in `bench.models.SIZES`.
    """

    def __init__(self, tree: Path, size: str) -> None:
        environment = os.environ | {
            "PYTHONPATH": f"{tree / 'python'}{os.pathsep}{tree}",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", size],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.jobs: list[str] = json.loads(self._read())

    def seconds(self, job: str) -> float:
        """Processor time of one run."""
        assert self._process.stdin is not None
        print(job, file=self._process.stdin, flush=True)
        return float(self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(">"):
                return line[1:]
        raise RuntimeError("the worker ended")


def serve(size: str) -> None:
    """A worker's side: runs jobs as their names come in."""
    sys.path.pop(0)  # this folder, put there as that of the script
    from bench import measure, models, test_evidence, test_fit, test_predict
    from laplace_lora_fast import Answers, LaplaceLoRA, Rows

    def narrow_rows(setting: models.Setting) -> measure.Work:
        """What the default was in the older tree, where it keeps more columns now."""
        la = LaplaceLoRA(setting.model, Answers(setting.answers), structure=Rows(columns=128))
        return measure.Work(lambda: la.fit(setting.loader, progress=False), float)

    setting = models.SIZES[size]()
    methods = {
        f"{job}, {method.name.removeprefix('this project, ')}": method
        for job, group in (
            ("fit", [*test_fit.EXACT_FISHER, *test_fit.ONE_LABEL]),
            ("predict", test_predict.METHODS),
            ("evidence", test_evidence.EVALUATED),
            ("prior precision", test_evidence.MAXIMISED),
        )
        for method in group
        if not method.peer and not any(host in method.name for host in _HOSTS)
    }
    prepares = {name: method.prepare for name, method in methods.items()}
    prepares["fit, rows of 128 columns"] = narrow_rows
    print(">" + json.dumps(list(prepares)), flush=True)
    ready = ""
    for line in sys.stdin:
        name = line.strip()
        if name != ready:
            ready, work = name, prepares[name](setting)
            work.run()
        start = time.process_time()
        work.run()
        print(f">{time.process_time() - start}", flush=True)


def compared(older: Path, size: str, rounds: int, only: str) -> Iterator[tuple[str, float, float, float]]:
    """(job, seconds before, seconds now, ratio) of every job."""
    workers = [Worker(older, size), Worker(_ROOT, size)]
    try:
        for job in workers[1].jobs:
            if job not in workers[0].jobs or only not in job:
                continue
            times: list[list[float]] = [[], []]
            for k in range(rounds):
                for which in (0, 1) if k % 2 else (1, 0):
                    times[which].append(workers[which].seconds(job))
            before, now = map(statistics.median, times)
            ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
            print(f"{size}: {job}: {before:.4g} s, {now:.4g} s, {ratio:.3f}", file=sys.stderr)
            yield job, before, now, ratio
    finally:
        for worker in workers:
            worker.close()


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "older")
        subprocess.run(["git", "worktree", "add", "--detach", tree, commit], cwd=_ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=_ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", nargs="+", default=["hidden-256", "hidden-1024", "SmolLM2-135M"])
    parser.add_argument("--rounds", type=int, nargs="+", default=[21, 7, 7], help="one for each size")
    parser.add_argument("--only", default="", help="jobs with this in their names")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    if options.commit is None:
        parser.error("which commit?")
    now = subprocess.check_output(["git", "rev-parse", "--short=7", "HEAD"], cwd=_ROOT, text=True).strip()
    found = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    with checkout(options.commit) as older:
        for size, rounds in zip(options.sizes, options.rounds, strict=True):
            for job, *figures in compared(older, size, rounds, options.only):
                found[f"{size} | {job}"] = [now, options.commit[:7], *figures]
    _RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    _RESULTS.with_suffix(".md").write_text(table(found))


def table(found: dict[str, list[Any]]) -> str:
    lines = [
        "# Fits and predictions against an older commit",
        "",
        "Processor time of one run, one thread, both trees in turns; ratios are medians of rounds, now over before. ",
        f"{platform.processor() or platform.machine()}; `python -m bench.since COMMIT`.",
        "",
        "| size | job | before, s | now, s | ratio | commits |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name, (now, commit, before, after, ratio) in found.items():
        lines.append(f"| {name} | {before:.4g} | {after:.4g} | {ratio:.2f} | {commit}, {now} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
