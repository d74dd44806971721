"""The machine: what it is, and how fast it can be, measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import lwft_kernels

from .timing import interleaved

LIBRARIES = ("lwft_kernels", "torch", "transformers", "peft", "triton", "numpy")


def processor() -> str:
    """The model name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _first_line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.splitlines()[0] if result.returncode == 0 and result.stdout else None


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
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        ).stdout

    return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")


def environment() -> dict[str, Any]:
    """Versions, processor, compiler, and what of ours is loaded, or why it is not."""
    backend = lwft_kernels.backend.describe()
    warning = torch.ops.lwft.cpu_isa_warning() if backend["why_not"] is None else ""
    return {
        **{name: _version(name) or "not installed" for name in LIBRARIES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "compiler": _first_line("c++", "--version") or "no c++ in PATH",
        "nvcc": (_first_line("nvcc", "--version") and "found")
        or "no nvcc in PATH: no CUDA kernels are built",
        "library": backend["library"] or f"not loaded: {backend['why_not']}",
        "instruction set": backend["cpu_isa"] or "-",
        **({"LWFT_CPU_ISA": warning} if warning else {}),
        "CUDA kernels": _cuda(backend),
        "Triton kernels": "none in this version",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "commit": commit() or "-",
    }


def _cuda(backend: dict[str, Any]) -> str:
    if not backend["cuda_kernels"]:
        return "not built"
    return "adapter forward is built, not proven on a GPU yet (LWFT_CUDA_UNPROVEN=1 tries it)"


def peaks(dtype: torch.dtype, min_time: float) -> dict[str, float]:
    """Measured limits with the threads in use: GEMM rate of torch.mm in `dtype` (flop/s), copy rate (bytes/s)."""
    n = 1024
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    source = torch.empty(2**25)  # 128 MiB, beyond any cache
    target = torch.empty_like(source)
    timings = interleaved({"gemm": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}, min_time)
    return {
        "gemm": 2 * n**3 / timings["gemm"].median,
        "copy": 2 * source.numel() * source.element_size() / timings["copy"].median,
    }
