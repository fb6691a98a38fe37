"""What is read off the machine code of a kernel for NVIDIA GPUs: known hazards, and how wide memory is read."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?);|\s*(\.L\w+):")
_STORES = ("ST", "RED", "BAR", "BRA", "UTMA", "SYNCS", "ATOM")  # their first register is read
_SCRATCH_WRITES, _RING_WRITES = ("STS", "STSM"), ("LDGSTS", "UTMALDG")


def instructions(listing: str) -> list[str]:
    """Of `nvdisasm -c`, in order, without their predicates; labels stand among them, with a colon."""
    found = (_LINE.match(line) for line in listing.splitlines())
    lines = [match[1].strip() if match[1] else f"{match[2]}:" for match in found if match]
    return [re.sub(r"^@!?U?P\w+\s+", "", line) for line in lines]


def overwritten_operands(code: Sequence[str]) -> list[str]:
    """Writes to registers of the A operand of an asynchronous product (HGMMA) that may still read them.

    Ptxas before 13.3 reuses them too early (triton issues 9433 and 11781).
    """
    found: list[str] = []
    in_flight: list[tuple[set[int], bool]] = []  # registers of A, and whether a commit group ends here
    for line in code:
        op = line.split()[0]
        if op.startswith("WARPGROUP.DEPBAR"):
            match = re.search(r"0x([0-9a-f]+)", line)
            pending = int(match[1], 16) if match else 0
            ends = [place for place, (_, last) in enumerate(in_flight) if last]
            if pending == 0:
                in_flight = []
            elif len(ends) > pending:
                in_flight = in_flight[ends[-pending - 1] + 1 :]
        elif op.startswith("HGMMA"):
            match = re.match(r"\S+\s+R(\d+),\s*R(\d+),\s*gdesc", line)
            registers = set(range(int(match[2]), int(match[2]) + 4)) if match else set()
            in_flight.append((registers, "gsb0" in line))
        else:
            match = re.match(r"\S+\s+R(\d+)\b", line)
            if match is None or op.startswith(_STORES):
                continue
            width = 4 if ".128" in op else 2 if ".64" in op or ".WIDE" in op else 1
            written = set(range(int(match[1]), int(match[1]) + width))
            found += [line for registers, _ in in_flight if registers & written]
    return found


def unguarded_writes(code: Sequence[str], warps: int) -> list[str]:
    """Writes to shared memory that another warp group's products may still read (triton issue 11047).

    What is overwritten in each step must have a barrier between the wait for the products and the write. The buffers of
    a pipeline take turns: they are written a step later than they are read, so that a barrier anywhere in the loop will
    do. The code is gone through twice, for loops.
    """
    if warps <= 4:
        return []
    found, waited = [], False
    for line in (*code, *code):
        if line.startswith("WARPGROUP.DEPBAR"):
            waited = True
        elif line.startswith("BAR"):
            waited = False
        elif waited and line.startswith(_SCRATCH_WRITES):
            found.append(line)
    for loop in _loops(code):
        waits = any(line.startswith("WARPGROUP.DEPBAR") for line in loop)
        if waits and not any(line.startswith(("BAR", "SYNCS")) for line in loop):
            found += [line for line in loop if line.startswith(_RING_WRITES)]
    return found


def _loops(code: Sequence[str]) -> list[Sequence[str]]:
    """The code between each label and a jump back to it."""
    places = {line[:-1]: place for place, line in enumerate(code) if line.endswith(":")}
    jumps = ((place, re.match(r"BRA\S*\s+.*`\((\.L\w+)\)", line)) for place, line in enumerate(code))
    return [
        code[places[jump[1]] : place] for place, jump in jumps if jump and places.get(jump[1], place) < place
    ]


def narrow_loads(code: Sequence[str]) -> list[str]:
    """Loads of two bytes, and copies to shared memory of less than eight: what a misjudged alignment leaves."""
    return [
        line
        for line in code
        if line.startswith(("LDG.E.U16", "LDG.E.S16"))
        or (line.startswith("LDGSTS") and not re.search(r"\.(64|128)\b", line))
    ]


def wide_copies(code: Sequence[str]) -> int:
    """Asynchronous copies of 16 bytes or of whole tiles."""
    return sum(bool(re.match(r"LDGSTS\S*\.128\b|UTMALDG", line)) for line in code)
