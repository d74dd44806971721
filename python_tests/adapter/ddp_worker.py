"""One of two processes of test_trains_under_ddp: `ddp_worker.py RANK STORE_FILE`.

Each process sees half of a batch; DistributedDataParallel must leave the gradients of the whole batch.
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lwft_kernels.nn import BottleneckAdapter


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = BottleneckAdapter(32, 8, "gelu", layer_norm=True)
    torch.nn.init.normal_(module.up.weight)
    batch, target = torch.randn(2, 2, 10, 32)

    parallel = DistributedDataParallel(module)
    torch.nn.functional.mse_loss(parallel(batch[rank]), target[rank]).backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]

    module.zero_grad()
    torch.nn.functional.mse_loss(module(batch), target).backward()
    for mine, parameter in zip(gradients, module.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
