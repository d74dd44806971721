"""A CUDA device: its clock, its cache, what it is."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch

from .timing import Clock, DeviceClock, HostClock

LEAST_FLUSH = 64 * 2**20  # bytes
CALIBRATION = 10_000_000  # turns of a waiting kernel: some milliseconds


def clock(device: torch.device, in_a_row: bool) -> Clock:
    """The clock for calls on `device`; `in_a_row` as `Case.in_a_row` says."""
    if device.type != "cuda":
        return HostClock()
    return HostClock(lambda: torch.cuda.synchronize(device)) if in_a_row else DeviceClock(CudaGpu(device))


class CudaGpu:
    """What `DeviceClock` needs of a GPU, on its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        # Read, not written: lines that wait to be written back would slow the call that is timed.
        self._other_data = torch.ones(max(2 * cache, LEAST_FLUSH) // 4, device=device)
        begin, end = self.event(), self.event()
        torch.cuda._sleep(CALIBRATION // 10)
        begin.record()
        torch.cuda._sleep(CALIBRATION)
        end.record()
        self.wait()
        self._turns_per_second = CALIBRATION / (begin.elapsed_time(end) / 1e3)

    def flush(self) -> None:
        self._other_data.sum()

    def occupy(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self._turns_per_second))

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)


def facts(device: torch.device) -> dict[str, Any]:
    """What a figure of this card has to be told with."""
    found = torch.cuda.get_device_properties(device)
    return {
        "GPU": found.name,
        "compute capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "GPU memory": found.total_memory,
        "L2 cache": found.L2_cache_size,
        "CUDA of torch": torch.version.cuda or f"none, HIP {torch.version.hip}",
        "cuDNN": torch.backends.cudnn.version(),
        **_driver(device),
    }


def _driver(device: torch.device) -> dict[str, str]:
    """What nvidia-smi says of driver, highest clocks and power limit."""
    if shutil.which("nvidia-smi") is None:
        return {}
    asked = {
        "driver": "driver_version",
        "highest SM clock": "clocks.max.sm",
        "highest memory clock": "clocks.max.memory",
        "power limit": "power.limit",
    }
    index = torch.cuda._get_nvml_device_index(device)
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    answers = result.stdout.strip().split(", ")
    return dict(zip(asked, answers, strict=True)) if len(answers) == len(asked) else {}
