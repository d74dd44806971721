"""Runs cases: arguments, correctness check, peak memory, interleaved timing; one row each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import lwft_kernels

from . import adapter, add_layer_norm, attention, frozen_linear, lora, low_rank, peft_module, quantized, torch_nn, work
from .case import Arguments, Case, Family, NotOffered, Run, in_preset, leaves, normal
from .correctness import Checker
from .cuda import clock
from .curves import LEAST_SIZES
from .memory import kept_memory, peak_memory, settle_allocator
from .results import FAILED, NOT_OFFERED, OURS, TIMED, WRONG, Result, Row
from .timing import interleaved

FAMILIES = {
    "attention": attention.FAMILY,
    "adapter": adapter.FAMILY,
    "lora": lora.FAMILY,
    "low_rank": low_rank.FAMILY,
    "frozen_linear": frozen_linear.FAMILY,
    "add_layer_norm": add_layer_norm.FAMILY,
    "quantized": quantized.FAMILY,
    "torch_nn": torch_nn.FAMILY,
    "peft": peft_module.FAMILY,
}
CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MODES = ("fwd", "fwdbwd")
COMPILED = {"compile", "flex"}  # providers that torch.compile makes


@dataclass(frozen=True)
class Plan:
    """One row to come."""

    family: Family
    case: Case
    dtype: str
    mode: str
    threads: int


def plans(
    families: tuple[str, ...],
    preset: str,
    dtypes: tuple[str, ...],
    modes: tuple[str, ...],
    threads: tuple[int, ...],
    providers: tuple[str, ...],
) -> list[Plan]:
    """The rows that a command line asks for; no `dtypes` means those of each case.

    Each row once: a larger preset may hold a case of a smaller one again, with further dtypes.
    """
    found = [
        Plan(FAMILIES[name], case, dtype, mode, count)
        for name in families
        if any(provider in FAMILIES[name].providers for provider in providers)
        for case in FAMILIES[name].cases
        if in_preset(case, preset)
        for dtype in (dtypes or case.dtypes)
        for mode in modes
        if mode == "fwd" or case.trains
        for count in threads
    ]
    once: dict[tuple[Any, ...], Plan] = {}
    for plan in found:
        once.setdefault((plan.family.op, plan.case.name, plan.dtype, plan.mode, plan.threads), plan)
    return list(once.values())


def thread_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4 and so on up to `most`, which is one of them."""
    return (*(1 << bit for bit in range((most - 1).bit_length())), most)


def curve_plans(
    families: tuple[str, ...],
    dtypes: tuple[str, ...],
    modes: tuple[str, ...],
    threads: tuple[int, ...],
    providers: tuple[str, ...],
) -> list[Plan]:
    """The points of the scaling curves with the most threads; the last point of each with every thread count."""

    def position(plan: Plan) -> tuple[tuple[Any, ...], int]:
        """Which curve, and where on it."""
        name, axis = plan.case.curve or ("", "")
        return (plan.family.op, name, axis, plan.dtype), plan.case.sizes.get(axis, 0)

    found = plans(families, "full", dtypes, modes, threads, providers)
    sizes: dict[tuple[Any, ...], set[int]] = {}
    for plan in found:
        if plan.case.curve is not None:
            curve, size = position(plan)
            sizes.setdefault(curve, set()).add(size)
    reached = {curve: max(members) for curve, members in sizes.items() if len(members) >= LEAST_SIZES}
    positions = [(plan, *position(plan)) for plan in found]
    return [
        plan
        for plan, curve, size in positions
        if curve in reached and (plan.threads == max(threads) or size == reached[curve])
    ]


def rows(
    planned: list[Plan], providers: tuple[str, ...], seed: int, min_time: float, device: torch.device = CPU
) -> Iterator[Row]:
    """Run the plans in their order. Arguments and oracle are made once per case and dtype."""
    settle_allocator()
    for (family, case, name), group in itertools.groupby(planned, lambda p: (p.family, p.case, p.dtype)):
        members = list(group)
        dtype = getattr(torch, name)
        if COMPILED & {*providers}:  # or the shapes of one case would make the code of the next one dynamic
            torch.compiler.reset()
        arguments = family.arguments(case, dtype, torch.Generator(device).manual_seed(seed))
        checker = Checker(family, case, arguments, dtype, any(plan.mode == "fwdbwd" for plan in members))
        for plan in members:
            torch.set_num_threads(plan.threads)
            yield _row(plan, arguments, checker, providers, min_time, device)


def _row(
    plan: Plan,
    arguments: Arguments,
    checker: Checker,
    providers: tuple[str, ...],
    min_time: float,
    device: torch.device,
) -> Row:
    """Every provider checked, then all that are right timed in turn, together with the machine's limits."""
    family, case, backward = plan.family, plan.case, plan.mode == "fwdbwd"
    lwft_kernels.reset_stats()
    results: dict[str, Result] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, bind in family.providers.items():
        if name in providers:
            results[name], call = _checked(name, bind, case, arguments, checker, backward, device)
            if call is not None:
                calls[name] = call

    needed = work.count(family, case, arguments, checker.output, backward)
    calls["GEMM"], flops = work.matrix_product(getattr(torch, plan.dtype), device)
    calls["copy"], traffic = work.copy(needed.bytes, device)
    beside = None if case.beside is None else case.beside(arguments)
    if beside is not None:
        calls[beside.name] = _call(beside.run, beside.arguments, backward)
    timings = interleaved(calls, min_time, clock(device, case.in_a_row))
    for name in results:
        if name in timings:
            results[name] = replace(results[name], **asdict(timings[name]))

    backend, declined = _who_answered(device)
    return Row(
        op=family.op,
        case=case.name,
        sizes=dict(case.sizes),
        curve=case.curve,
        dtype=plan.dtype,
        mode=plan.mode,
        threads=plan.threads,
        flops=needed.flops,
        bytes=needed.bytes,
        gemm_rate=flops / timings["GEMM"].median,
        copy_rate=traffic / timings["copy"].median,
        backend=backend,
        declined=declined,
        in_a_row=case.in_a_row,
        beside=None if beside is None else beside.name,
        beside_seconds=None if beside is None else timings[beside.name].median,
        results=results,
    )


def _checked(
    name: str,
    bind: Callable[[Case, Arguments], Run],
    case: Case,
    arguments: Arguments,
    checker: Checker,
    backward: bool,
    device: torch.device,
) -> tuple[Result, Callable[[], object] | None]:
    """What the check found, and the call to time, None where there is none."""
    try:
        if name == OURS and lwft_kernels.current_backend() == "reference":
            raise NotOffered("the backend 'reference' is chosen: there is nothing of ours to time")
        run = bind(case, arguments)
        verdict = checker.ours(run, backward) if name == OURS else checker.peer(name, run, backward)
        found = Result(TIMED, error=verdict.error, allowed_error=verdict.allowed)
        if verdict.complaint is not None:
            return replace(found, status=WRONG, note=verdict.complaint), None
        call = _call(run, arguments, backward)
        kept = kept_memory(run, device) if backward else None
        return replace(found, peak_memory=peak_memory(call, device), kept_memory=kept), call
    except NotOffered as reason:
        return Result(NOT_OFFERED, str(reason)), None
    except Exception as error:
        return Result(FAILED, f"{type(error).__name__}: {error}".splitlines()[0]), None


def _call(run: Run, arguments: Arguments, backward: bool) -> Callable[[], object]:
    """What is timed: forward without autograd, or forward and the gradients of all that train."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return run()

        call: Callable[[], object] = forward
    else:
        wanted = list(leaves(arguments).values())
        out = run()
        direction = normal(torch.Generator(out.device).manual_seed(1), out.dtype, *out.shape)
        del out

        def forward_and_backward() -> object:
            return torch.autograd.grad(run(), wanted, direction)

        call = forward_and_backward
    call()  # a first call compiles, packs and allocates what later ones find
    return call


def _who_answered(device: torch.device) -> tuple[str, tuple[str, ...]]:
    """The backend of our calls since the statistics were reset, and why the fast path was declined if it was."""
    counts = lwft_kernels.stats()
    declined = tuple(dict.fromkeys(reason for count in counts.values() for reason in count["declined"]))
    fast = {lwft_kernels.backend.implementation(op, device) for op, count in counts.items() if count["fast"]}
    return "reference" if declined else ", ".join(sorted(fast)) or "-", declined
