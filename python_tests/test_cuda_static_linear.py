"""What nvcc made of the linear head's kernels keeps the rules; no GPU is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import cuda_static

LINEAR = cuda_static.KERNELS.with_name("linear_bias_loss_kernels.cu")


@pytest.mark.skipif(cuda_static.missing() is not None, reason=str(cuda_static.missing()))
@pytest.mark.parametrize("architecture", cuda_static.ARCHITECTURES)
def test_machine_code_of_the_linear_kernels(architecture: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_static, "KERNELS", LINEAR)
    kernels = cuda_static.compile_kernels(architecture)
    main = [kernel for kernel in kernels if kernel.base == "linear_on_chip"]
    assert len(main) == 9  # float32 with tiles of 4, 8 and 12 columns, the others of 4 and 8
    for kernel in kernels:
        facts = cuda_static.judge(kernel, architecture)
        assert (facts.spills, facts.stack, facts.local) == (0, 0, 0), kernel.name
        assert "double" in kernel.name or facts.double_instructions == 0, kernel.name
    for kernel in main:
        assert kernel.registers <= 128, kernel.name  # two blocks of 256 threads, or one of 512
        opcodes = [instruction.opcode for instruction in kernel.code]
        for wide in ("LDG.E.128", "STG.E.128", "LDS.128", "STS.128"):
            assert any(opcode.startswith(wide) for opcode in opcodes), (kernel.name, wide)
