"""The machine: what it is, and how fast it can be, measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import lwft_kernels

from . import cuda, work
from .timing import interleaved

LIBRARIES = ("torch", "transformers", "peft", "triton", "numpy")


def processor() -> str:
    """The model name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _says(*command: str, line: str = "") -> str | None:
    """The first line of what a program prints that contains `line`; None where there is no such program."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return next((text for text in result.stdout.splitlines() if line in text), None)


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the source tree this runs from, "+" when it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False).stdout

    return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, processor, compiler, what of ours is loaded, or why it is not; the card where `device` is one."""
    backend = lwft_kernels.backend.describe()
    warning = torch.ops.lwft.cpu_isa_warning() if backend["why_not"] is None else ""
    return {
        "lwft_kernels": lwft_kernels.__version__,
        # a copy that has no .git can be told what it is of
        "commit": commit() or os.environ.get("LWFT_COMMIT") or "unknown, this is no git checkout",
        **{name: _version(name) or "not installed" for name in LIBRARIES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "torch instruction set": torch.backends.cpu.get_cpu_capability(),
        "library": backend["library"] or f"not loaded: {backend['why_not']}",
        "backend": backend["backend"],
        "instruction set": backend["cpu_isa"] or "-",
        **({"LWFT_CPU_ISA": warning} if warning else {}),
        "CUDA kernels": _cuda(backend),
        "Triton kernels": backend["why_not_triton"] or "for GPUs of compute capability 8.0 or later",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else _no_gpu(),
        **(cuda.facts(device) if device is not None and device.type == "cuda" else {}),
        "compiler": _says("c++", "--version") or "no c++ in PATH: the library and torch.compile cannot be built",
        "nvcc": _says("nvcc", "--version", line="release") or "not in PATH: a build here leaves the CUDA kernels out",
    }


def _no_gpu() -> str:
    return "none" if torch.version.cuda else "none, and this torch is built without CUDA"


def _cuda(backend: dict[str, Any]) -> str:
    if not backend["cuda_kernels"]:
        return "not built" if backend["library"] else "-"
    return "adapter forward is built, not proven on a GPU yet (LWFT_CUDA_UNPROVEN=1 tries it)"


def peaks(dtypes: tuple[torch.dtype, ...], device: torch.device, min_time: float = 0.05) -> dict[str, float]:
    """Measured limits, of the threads in use or of the card: flop/s of torch.mm by dtype, bytes/s of a large copy."""
    products = {f"GEMM {str(dtype).removeprefix('torch.')}": work.matrix_product(dtype, device) for dtype in dtypes}
    copy, traffic = work.copy(work.LARGEST_COPY[device.type], device)
    calls = {**{name: call for name, (call, _) in products.items()}, "copy": copy}
    timings = interleaved(calls, min_time, cuda.clock(device, in_a_row=False))
    rates = {name: flops / timings[name].median for name, (_, flops) in products.items()}
    return {**rates, "copy": traffic / timings["copy"].median}
