"""What a kernel's configuration has to know of a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """A GPU, or a class of them.

    Attributes:
        name: as the driver gives it; names the file of measured configurations.
        architecture: 80 for compute capability 8.0 and so on; 942 for AMD's gfx942.
        shared_memory: bytes that one block may have.
        multiprocessors: how many of them.
        maker: "cuda" or "hip", Triton's words.
    """

    name: str
    architecture: int
    shared_memory: int
    multiprocessors: int
    maker: str = "cuda"

    @property
    def large(self) -> bool:
        """Whether a block may have the 160 KiB of a data-centre card; the others have 99 KiB, AMD's 64 KiB."""
        return self.shared_memory >= 160 << 10


# The classes that `lwft-bench kernels` compiles for. Shared memory: CUDA C++ Programming Guide, table of technical
# specifications per compute capability; AMD Instinct MI300 instruction set architecture, section 2.
CLASSES = (
    Card("sm_80 (A100)", 80, 163 << 10, 108),
    Card("sm_86 (RTX 30)", 86, 99 << 10, 84),
    Card("sm_90 (H100, H200)", 90, 227 << 10, 132),
    Card("sm_100 (B200)", 100, 227 << 10, 148),
    Card("sm_120 (RTX 50)", 120, 99 << 10, 170),
    Card("gfx942 (MI300)", 942, 64 << 10, 304, "hip"),
)

_assumed: Card | None = None


def assume(card: Card | None) -> None:
    """Let `card_of` answer with `card` for every device: to compile for a card that is not here. None ends that."""
    global _assumed
    _assumed = card


def card_of(device: torch.device) -> Card:
    """The card that `device` is; for a device that is none (the interpreter's CPU) that of an H100."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return CLASSES[2]
    return _card(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _card(index: int) -> Card:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Card(found.name, 942, 64 << 10, found.multi_processor_count, "hip")
    return Card(
        found.name,
        found.major * 10 + found.minor,
        found.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        found.multi_processor_count,
    )
