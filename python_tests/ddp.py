"""Does a module train under DistributedDataParallel? As a program: one of the two processes.

Each process sees half of a batch; DistributedDataParallel must leave the gradients of the whole batch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lwft_kernels
import lwft_kernels.nn


def assert_averages_gradients(module: str, width: int, store: Path) -> None:
    """`module`: an expression over torch's `nn`, `lwft` (lwft_kernels.nn) and `Calls`; `store`: a file yet to be."""
    package_parent = str(Path(lwft_kernels.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": package_parent, "OMP_NUM_THREADS": "1", "LWFT_BACKEND": "native"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(store), module, str(width)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


class Calls(nn.Module):
    """A module with a call of another form: of one tensor, for one tensor."""

    def __init__(self, module: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.how = module, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.module, x)


def main(rank: int, store: str, expression: str, width: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = eval(expression, {"nn": nn, "lwft": lwft_kernels.nn, "Calls": Calls})
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.5)
    batch, target = torch.randn(2, 2, 10, width)

    parallel = DistributedDataParallel(module)
    nn.functional.mse_loss(parallel(batch[rank]), target[rank]).backward()
    gradients = [parameter.grad.clone() for parameter in trained]

    module.zero_grad()
    nn.functional.mse_loss(module(batch), target).backward()
    for mine, parameter in zip(gradients, trained, strict=True):
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(mine, parameter.grad)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4]))
    # Not through the interpreter's end: gloo's threads, still running there, now and then abort the process
    # ("terminate called without an active exception"), with modules of torch alone as well.
    os._exit(0)
