"""Every configuration in the tables compiles, fits its architecture, and uses what it promises."""

from __future__ import annotations

import pytest

from tests.kernels.triton_launches import TENSOR_CORE, launches
from tests.kernels.triton_offline import SHARED_MEMORY, TARGETS, compiling_for

# Ptxas saves one kernel registers, for two blocks a multiprocessor, at the price of 8 bytes spilled.
SPILLS = {"sm_80": 8, "sm_100": 8}
CASES = [(arch, launch) for arch in TARGETS for launch in launches(arch)]


@pytest.mark.parametrize(("arch", "launch"), CASES, ids=[f"{arch}: {launch.label}" for arch, launch in CASES])
def test_resources(arch, launch):
    with compiling_for(arch) as compiled:
        launch.run()
    assert compiled, "nothing was compiled"
    for kernel in compiled:
        assert kernel.spills <= SPILLS.get(arch, 0), kernel
        assert not kernel.serialized, kernel
        assert not kernel.hazards, kernel
        assert kernel.shared <= SHARED_MEMORY[arch], kernel
        if kernel.kernel == "_add_up":
            continue  # it multiplies nothing
        assert any(kernel.instructions[instruction] for instruction in TENSOR_CORE.values()), kernel
        for instruction in launch.promised:
            assert kernel.instructions[instruction] > 0, (instruction, kernel)
        if "UTMALDG" in launch.promised:
            assert kernel.instructions["LDGSTS"] == 0, kernel
        if launch.reads_wide and arch == "sm_90":
            assert not kernel.narrow, kernel
            assert kernel.wide > 0, kernel


def test_spills_and_shared_memory_are_seen():
    """A configuration too large for the registers, and one too large for shared memory."""
    import torch
    from triton.runtime.errors import OutOfResources

    from laplace_kernels.triton import gram, triangle

    def compile_tile(tile):
        with pytest.MonkeyPatch.context() as patch, compiling_for("sm_90") as compiled:
            patch.setattr(gram, "schedule", lambda *args: (tile, 1))
            gram.gram_(torch.empty(512, 512), torch.empty(100, 512).bfloat16(), None, 1.0)
        return compiled

    (crowded,) = compile_tile(triangle.Tile(128, 128, 64, 4, 2))
    assert crowded.spills > 0
    with pytest.raises(OutOfResources, match="shared memory"):
        compile_tile(triangle.Tile(256, 128, 128, 4, 8))
