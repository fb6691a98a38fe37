"""The readers of machine code see what they are for."""

from __future__ import annotations

from tests.kernels import sass

LISTING = """
.L_x_1:
        /*0040*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR6][R2.64] ;
        /*0050*/              @!P1 STS.64 [R3], R4 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   WARPGROUP.ARRIVE ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR20], R24, gsb0 ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/               @P0 BRA `(.L_x_1) ;
"""


def test_instructions_lose_their_predicates_and_labels_stay() -> None:
    code = sass.instructions(LISTING)
    assert code[0] == ".L_x_1:"
    assert code[2] == "STS.64 [R3], R4"
    assert len(code) == 8


def test_scratch_memory_needs_a_barrier_and_a_ring_one_in_its_loop() -> None:
    code = sass.instructions(LISTING)
    assert sass.unguarded_writes(code, 8) == ["STS.64 [R3], R4"]  # in the second step
    assert not sass.unguarded_writes(code, 4)
    without = [line for line in code if not line.startswith(("BAR", "STS"))]
    assert sass.unguarded_writes(without, 8) == ["LDGSTS.E.BYPASS.128 [R1], desc[UR6][R2.64]"]
    guarded = [*code[:1], "BAR.SYNC.DEFER_BLOCKING 0x0", *code[1:]]
    assert not sass.unguarded_writes(guarded, 8)


def test_operands_in_flight_may_not_be_written() -> None:
    product, wait = (
        "HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR20], R24, gsb0",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    )
    assert sass.overwritten_operands([product, "MOV R66, R1", wait]) == ["MOV R66, R1"]
    assert sass.overwritten_operands([product, "LDS.128 R61, [R1]", wait]) == ["LDS.128 R61, [R1]"]
    assert not sass.overwritten_operands([product, wait, "MOV R66, R1"])
    assert not sass.overwritten_operands([product, "STS [R66], R1", "MOV R68, R1", wait])
    other = product.replace("R64", "R80")
    one_pending = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert not sass.overwritten_operands([product, other, one_pending, "MOV R64, R1"])
    assert sass.overwritten_operands([product, other, one_pending, "MOV R80, R1"]) == ["MOV R80, R1"]


def test_loads_of_a_few_bytes_are_seen() -> None:
    code = [
        "LDG.E.U16 R1, [R2]",
        "LDGSTS.E [R1], [R2]",
        "LDGSTS.E.BYPASS.128 [R1], [R2]",
        "LDG.E.128 R1, [R2]",
        "UTMALDG.2D [UR8]",
    ]
    assert sass.narrow_loads(code) == code[:2]
    assert sass.wide_copies(code) == 2
