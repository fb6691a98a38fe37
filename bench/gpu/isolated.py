"""Measuring in a process of its own, which may crash or hang without the report.

After a fault in a kernel every later call in its process fails. So cases run in a child; where a case breaks it, the
next one begins in a new child.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

Record = dict[str, Any]
Measure = Callable[[Any], Iterator[Record]]


def run_cases(
    cases: Sequence[Any], describe: Callable[[Any], Record], measure: Measure, seconds: float, deadline: float
) -> Iterator[Record]:
    """The records of every case that is begun before the deadline.

    Args:
        cases: what to measure; picklable.
        describe: what names a case in a record that says it failed.
        measure: makes the records of one case; importable by name, or a partial of such a function.
        seconds: for one record of a case; beyond it the case hangs.
        deadline: of time.monotonic(); what is not begun by then is recorded as skipped.
    """
    begin = 0
    while begin < len(cases):
        child = _Child(cases[begin:], measure, deadline)
        for case in cases[begin:]:
            begin += 1
            records, broken = child.records(seconds)
            yield from records
            if broken:
                yield {**describe(case), "failed": broken}
                break
            if not records:
                yield {**describe(case), "skipped": "out of time"}
        child.stop()


class _Child:
    def __init__(self, cases: Sequence[Any], measure: Measure, deadline: float) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self._records, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_work, args=(theirs, cases, measure, deadline - time.monotonic()), daemon=True
        )
        self._process.start()
        theirs.close()

    def records(self, seconds: float) -> tuple[list[Record], str]:
        """Of the next case; and what broke the child, if something did."""
        received: list[Record] = []
        try:
            while self._records.poll(seconds):
                message = self._records.recv()
                if message is None:  # the case is over
                    return received, ""
                if isinstance(message, str):
                    return received, message
                received.append(message)
        except EOFError:
            self._process.join()
            return received, f"its process died with exit code {self._process.exitcode}"
        return received, f"it hangs: no result in {seconds:.0f} s"

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._records.close()


def _work(out: Connection, cases: Sequence[Any], measure: Measure, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    torch.manual_seed(0)
    for case in cases:
        try:
            if time.monotonic() < deadline:
                for record in measure(case):
                    out.send(record)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # the next case wants blocks of other sizes
        except Exception as error:  # out of memory, or a device that does not answer any more: start afresh
            traceback.print_exc()
            out.send(" ".join(f"{type(error).__name__}: {error}".split())[:500])
            os._exit(1)
        out.send(None)
