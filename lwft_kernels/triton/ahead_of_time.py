"""Compiles the kernels of chosen calls for cards that are not here, and reads what the compiler made of them.

The calls run on meta tensors and their launches are written down, so that what is compiled is what a GPU would be
given: the same specialisation to dtypes, alignment and sizes, each candidate configuration. Neither too much shared
memory nor registers that spill to memory are errors to the compiler; here they are faults.

Needs a process without ``TRITON_INTERPRET=1``: `lwft-bench kernels`.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from lwft_kernels.triton import cards
from lwft_kernels.triton.cards import Card
from lwft_kernels.triton.launch import Launch, record

ROOMS = ("attention", "adapter", "lowrank", "norm", "quantized")
MATRIX_INSTRUCTIONS = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma\w*)\b")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Call:
    """A call whose kernels are compiled.

    Attributes:
        name: what is special about it.
        run: makes meta tensors and calls the functions of a room's `triton_op`.
        matrix: the kernels, by name, that must use the matrix instructions of the card.
        may_spill: kernels that are let spill, with the reason.
    """

    name: str
    run: Callable[[], object]
    matrix: frozenset[str] = frozenset()
    may_spill: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch for one card. Bytes, and registers per thread; `faults` in words."""

    room: str
    call: str
    kernel: str
    configuration: str
    card: str
    registers: int
    shared_memory: int
    stack: int
    spills: int
    programs_per_multiprocessor: int
    matrix_instructions: tuple[str, ...]
    faults: tuple[str, ...]


def calls(rooms: Sequence[str] = ROOMS) -> Iterator[tuple[str, Call]]:
    """The calls of the rooms' `triton_calls`."""
    for room in rooms:
        for call in importlib.import_module(f"lwft_kernels.{room}.triton_calls").calls():
            yield room, call


def compile_all(rooms: Sequence[str] = ROOMS, classes: Sequence[Card] = cards.CLASSES) -> Iterator[Compiled]:
    """Compile every launch of every call for every class of cards, each only once."""
    seen: set[tuple[object, ...]] = set()
    for room, call in calls(rooms):
        for card in classes:
            cards.assume(card)
            try:
                launches = record(call.run)
            finally:
                cards.assume(None)
            for launch in launches:
                signature, constants, attributes = specialised(launch, _target(card))
                key = (
                    card.name,
                    launch.kernel.__name__,
                    tuple(signature.items()),
                    tuple((name, str(value)) for name, value in constants.items()),
                    tuple(attributes),
                    launch.configuration.num_warps,
                    launch.configuration.num_stages,
                )
                if key not in seen:
                    seen.add(key)
                    yield _compiled(
                        room, call, launch, card, ASTSource(launch.kernel, signature, constants, attributes)
                    )


def specialised(launch: Launch, target: GPUTarget) -> tuple[dict[str, str], dict[Any, Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and attributes, derived from the arguments by Triton's launcher itself."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    backend = make_backend(target)
    positional = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.constants[name] if name in launch.constants else positional[name]
        if parameter.is_constexpr:
            kind, hint = "constexpr", None
        else:
            plain = parameter.do_not_specialize
            kind, hint = native_specialize_impl(type(backend), value, False, not plain, not plain)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif hint:
            attributes[(index,)] = backend.parse_attr(hint)
    return signature, constants, attributes


def _target(card: Card) -> GPUTarget:
    if card.maker == "hip":
        return GPUTarget("hip", f"gfx{card.architecture}", 64)
    return GPUTarget("cuda", card.architecture, 32)


def _compiled(room: str, call: Call, launch: Launch, card: Card, source: ASTSource) -> Compiled:
    configuration, name = launch.configuration, launch.kernel.__name__
    target = _target(card)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    try:
        binary = triton.compile(source, target=target, options=options)
    except Exception as error:  # of the compiler and of the assembler, which have no common name
        why = f"does not compile: {type(error).__name__}: {str(error).strip()[-500:]}"
        return Compiled(room, call.name, name, str(configuration), card.name, 0, 0, 0, 0, 0, (), (why,))
    registers, stack, spills, code = _nvidia(binary) if card.maker == "cuda" else _amd(binary)
    shared = binary.metadata.shared
    instructions = tuple(sorted(set(MATRIX_INSTRUCTIONS.findall(code))))
    faults = []
    if shared > card.shared_memory:
        faults.append(f"{shared} bytes of shared memory, the card has {card.shared_memory}")
    if (stack or spills) and name not in call.may_spill:
        faults.append(f"spills: {stack} bytes of stack, {spills} loads and stores of it")
    if name in call.matrix and not instructions:
        faults.append("no matrix instruction")
    return Compiled(
        room,
        call.name,
        name,
        str(configuration),
        card.name,
        registers,
        shared,
        stack,
        spills,
        _programs(card, registers, shared, configuration.num_warps, target.warp_size),
        instructions,
        tuple(faults),
    )


def _nvidia(binary: Any) -> tuple[int, int, int, str]:
    """Registers, stack, loads and stores of spilled registers, and the disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output(_TOOLS / "cuobjdump", "-res-usage", file.name)
        code = _output(_TOOLS / "nvdisasm", "-c", file.name)
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    return int(found["REG"]), int(found["STACK"]), len(re.findall(r"\b(?:STL|LDL)\b", code)), code


def _output(*command: object) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def _amd(binary: Any) -> tuple[int, int, int, str]:
    code = binary.asm["amdgcn"]

    def number(pattern: str) -> int:
        return max((int(found) for found in re.findall(pattern, code)), default=0)

    return (
        number(r"\.vgpr_count:\s+(\d+)"),
        number(r"ScratchSize:\s+(\d+)"),
        number(r"\.vgpr_spill_count:\s+(\d+)"),
        code,
    )


def _programs(card: Card, registers: int, shared: int, num_warps: int, warp: int) -> int:
    """How many programs a multiprocessor holds: by registers, shared memory and warps (CUDA occupancy calculator).

    Of NVIDIA's cards, 65536 registers handed out to warps by 256; 64 warps, 48 on those with little shared memory; the
    driver keeps 1 KiB of shared memory per program. Of AMD's, 512 registers for each lane of four units.
    """
    if card.maker == "hip":
        by_registers = 4 * (512 // max(-(-registers // 8) * 8, 1)) // num_warps
        return min(by_registers, card.shared_memory // shared if shared else 32, 32 // num_warps)
    by_registers = 65536 // (-(-registers * warp // 256) * 256 * num_warps)
    by_warps = (64 if card.large else 48) // num_warps
    return min(by_registers, (card.shared_memory + 1024) // (shared + 1024), by_warps, 32)
