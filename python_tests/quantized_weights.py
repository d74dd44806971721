"""Quantised weights of any shape, made of random codes, in the formats of bitsandbytes."""

from __future__ import annotations

import torch

from lwft_kernels.functional import QuantizedWeight

FORMATS = ("nf4", "nested", "int8")

# QLoRA, Dettmers et al. 2023, appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def make_weight(kind, d_out, d_in, device="cpu", blocksize=64, absmax_blocksize=256):
    generator = torch.Generator().manual_seed(d_out * 1000 + d_in)

    def codes(*shape, dtype=torch.uint8):
        lowest, highest = (-127, 128) if dtype == torch.int8 else (0, 256)
        return torch.randint(lowest, highest, shape, generator=generator, dtype=dtype).to(device)

    def positive(*shape):
        return (0.5 + torch.rand(shape, generator=generator)).to(device)

    if kind == "int8":
        return QuantizedWeight(codes(d_out, d_in, dtype=torch.int8), positive(d_out), (d_out, d_in))
    packed, blocks = codes(-(-d_out * d_in // 2), 1), -(-d_out * d_in // blocksize)
    table = torch.tensor(NF4, device=device)
    if kind == "nf4":
        return QuantizedWeight(packed, positive(blocks), (d_out, d_in), table, blocksize)
    return QuantizedWeight(
        packed, positive(-(-blocks // absmax_blocksize)), (d_out, d_in), table, blocksize,
        codes(blocks), torch.linspace(-1, 1, 256, device=device), torch.tensor(1.5, device=device), absmax_blocksize,
    )  # fmt: skip
