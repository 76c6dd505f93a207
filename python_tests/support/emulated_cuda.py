"""The CUDA kernels on the CPU emulator of csrc/emulator, as a backend for the shared cases.

The shared library is compiled from the unmodified kernel source when it is first used, and kept
under build/ by the hash of all it is made from.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
UNITS = (
    "cuda/bias_loss_kernels.cu",
    "cuda/linear_bias_loss_kernels.cu",
    "emulator/emulator.cpp",
    "emulator/fiber.cpp",
    "emulator/memory.cpp",
    "emulator/c_interface.cpp",
)
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-gnu-unique",
    "-Wno-unknown-pragmas",
)
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SCHEDULES = {"forward": 0, "reverse": 1, "random": 2, "priority": 3}
MULTIPROCESSORS = 2
SHARED_MEMORY = 227 * 1024


class _Call(ctypes.Structure):
    """LnlEmulatedCall of csrc/emulator/c_interface.cpp."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "classes", "positions")),
        ("channels_last", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("logits", "labels", "probabilities")),
        ("wide_probabilities", ctypes.c_int),
        ("weight", ctypes.c_void_p),
        *(
            (name, ctypes.POINTER(ctypes.c_double))
            for name in ("reversal", "entropy_weight", "confusion_weight")
        ),
        ("ignore_index", ctypes.c_int64),
        ("label_smoothing", ctypes.c_double),
        ("reduction", ctypes.c_int),
        ("mask_entropy", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("loss", "cross_entropy", "entropy", "denominators")),
        ("denominators_given", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("upstream", "gradient", "head_gradient")),
    )


def compiler() -> str | None:
    """Return the C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def missing() -> str | None:
    """Say why the kernels cannot be emulated here, or return None if they can."""
    return None if compiler() else "there is no C++ compiler to build the emulated kernels with"


@functools.cache
def library_path() -> Path:
    """Compile (once) the emulated kernels."""
    sources = sorted(
        path
        for folder in (".", "cuda", "emulator", "emulator/include", "emulator/include/cuda")
        for path in (CSRC / folder).iterdir()
        if path.is_file() and path.suffix in {".cu", ".cuh", ".cpp", ".h", ""}
    )
    command = [str(compiler()), *FLAGS, "-I", str(CSRC / "emulator/include")]
    command += ["-I", str(CSRC / "emulator"), "-x", "c++", "-c"]
    objects = [f"{Path(unit).stem}.o" for unit in UNITS]
    commands = [[*command, str(CSRC / unit)] for unit in UNITS]
    return compiled("kernels", sources, [*commands, [str(compiler()), "-shared", *objects]])


def compiled(name: str, sources: list[Path], commands: list[list[str]]) -> Path:
    """Return a shared library, built by the last of `commands` unless it is there already.

    It lies under build/, by the hash of `sources` and `commands`. The commands run in an empty
    folder, the last one, which gets ``-o`` and the library's name, when all others are done.
    """
    digest = hashlib.sha256(str(commands).encode())
    for path in sources:
        digest.update(path.read_bytes())
    target = ROOT / "build" / "emulated" / f"{name}-{digest.hexdigest()[:16]}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    # One process builds it, the others wait; it is there whole or not at all.
    with filelock.FileLock(target.with_suffix(".lock")):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                run = functools.partial(subprocess.run, check=True, cwd=folder)
                with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as jobs:
                    list(jobs.map(run, commands[:-1]))
                run([*commands[-1], "-o", target.name])
                (Path(folder) / target.name).replace(target)
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """Compile (once) and load the emulated kernels."""
    loaded = ctypes.CDLL(str(library_path()))
    loaded.lnl_emulated_error.restype = ctypes.c_char_p
    loaded.lnl_emulated_bias_loss.argtypes = (ctypes.POINTER(_Call), ctypes.c_int, ctypes.c_int)
    loaded.lnl_emulated_kernel.restype = ctypes.c_char_p
    loaded.lnl_emulated_kernel.argtypes = (ctypes.c_int, *[ctypes.c_int64] * 3)
    loaded.lnl_emulated_linear_fits.argtypes = (
        ctypes.c_int,
        *[ctypes.c_int64] * 4,
        *[ctypes.c_int] * 2,
    )
    loaded.lnl_emulated_scale_gradient.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
    )
    loaded.lnl_emulated_schedule.argtypes = (ctypes.c_int, ctypes.c_uint64)
    return loaded


def set_schedule(name: str, seed: int = 1) -> None:
    """Choose the order in which emulated threads and blocks run."""
    library().lnl_emulated_schedule(SCHEDULES[name], seed)


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"emulated kernel: {library().lnl_emulated_error().decode()}")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _accumulation(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _is_channels_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


class _Prepared:
    """What csrc/cuda/bias_loss_cuda.cpp makes of an operator's arguments."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        denominators: Tensor | None,
        reversal: Tensor | None,
        entropy_weight: Tensor | None,
        confusion_weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        reduction: int,
        mask_entropy: bool,
        heads: int,
        logits_gradient: bool,
        head_gradient: bool,
    ) -> None:
        self.dtype = _accumulation(logits)
        channels_last = _is_channels_last(logits)
        logits = logits if channels_last else logits.contiguous()
        positions = 1
        for size in logits.shape[2:]:
            positions *= size
        probabilities = target.is_floating_point()
        if probabilities and target.dtype != logits.dtype:
            target = target.to(self.dtype)
        if probabilities and channels_last:
            target = target.movedim(1, -1).contiguous().movedim(-1, 1)
        else:
            target = target.contiguous()
        weight = None if weight is None else weight.to(self.dtype).contiguous()
        self.gradient = torch.empty_like(logits) if logits_gradient else logits.new_empty(0)
        self.head_gradient = torch.empty_like(logits) if head_gradient else logits.new_empty(0)
        if denominators is not None:
            denominators = denominators.to(self.dtype).contiguous()
        self.held = [logits, target, weight, denominators]
        self.shape = (logits.shape[0], *logits.shape[2:]) if reduction == 0 else ()
        any_address = ctypes.addressof(ctypes.c_int64(0))
        self.call = _Call(
            dtype=DTYPES[logits.dtype],
            rows=logits.shape[0],
            heads=heads,
            classes=logits.shape[1] // heads,
            positions=positions,
            channels_last=channels_last or positions == 1,
            logits=_address(logits),
            labels=None if probabilities else _address(target) or any_address,
            probabilities=_address(target) if probabilities else None,
            wide_probabilities=probabilities and target.dtype != logits.dtype,
            weight=_address(weight),
            denominators=_address(denominators),
            denominators_given=denominators is not None,
            reversal=self._coefficient(reversal),
            entropy_weight=self._coefficient(entropy_weight),
            confusion_weight=self._coefficient(confusion_weight),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            mask_entropy=mask_entropy,
            gradient=_address(self.gradient) if logits_gradient else None,
            head_gradient=_address(self.head_gradient) if head_gradient else None,
        )

    def _coefficient(self, value: Tensor | None):
        if value is None:
            return None
        number = ctypes.c_double(float(value))
        self.held.append(number)
        return ctypes.pointer(number)

    def launch(self) -> None:
        _check(
            library().lnl_emulated_bias_loss(
                ctypes.byref(self.call), MULTIPROCESSORS, SHARED_MEMORY
            )
        )


def bias_loss(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    """lnl_ext::bias_loss by the emulated kernels, on CPU tensors."""
    prepared = _Prepared(logits, *arguments)
    loss, cross_entropy, entropy = (
        torch.empty(prepared.shape, dtype=prepared.dtype) for _ in range(3)
    )
    denominators = torch.ones(prepared.call.heads, 2, dtype=prepared.dtype)
    prepared.call.loss = _address(loss)
    prepared.call.cross_entropy = _address(cross_entropy)
    prepared.call.entropy = _address(entropy)
    if not prepared.call.denominators_given:
        prepared.call.denominators = _address(denominators)
    if loss.numel():
        prepared.launch()
    return loss, cross_entropy, entropy, denominators, prepared.gradient, prepared.head_gradient


def bias_loss_backward(grad_loss: Tensor, logits: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """lnl_ext::bias_loss_backward by the emulated kernels, on CPU tensors."""
    prepared = _Prepared(logits, *arguments)
    upstream = grad_loss.to(prepared.dtype).contiguous()
    prepared.call.upstream = _address(upstream)
    if logits.numel():
        prepared.launch()
    return prepared.gradient, prepared.head_gradient


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """lnl_ext::scale_gradient_ by the emulated kernel, on a dense CPU tensor."""
    _check(
        library().lnl_emulated_scale_gradient(
            _address(gradient),
            gradient.numel(),
            DTYPES[gradient.dtype],
            _address(factor),
            DTYPES[factor.dtype],
            2,
        )
    )


def kernel(dtype: torch.dtype, rows: int, classes: int, positions: int) -> str:
    """Return the name of the kernel that logits of this shape with class labels get."""
    name: bytes = library().lnl_emulated_kernel(DTYPES[dtype], rows, classes, positions)
    return name.decode()


def linear_fits(dtype: torch.dtype, rows: int, heads: int, classes: int, width: int) -> bool:
    """Tell whether a linear head is one kernel's work, whatever its targets and gradients."""
    fits = library().lnl_emulated_linear_fits(
        DTYPES[dtype], rows, heads, classes, width, MULTIPROCESSORS, SHARED_MEMORY
    )
    return bool(fits)
