"""Runs cases: arguments, correctness check, interleaved timing, one row each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

import lwft_kernels

from . import adapter, add_layer_norm, attention, lora, low_rank, machine
from .case import Case, Family, NotOffered, Run, in_preset
from .correctness import Checker, leaves
from .report import OURS
from .timing import interleaved

FAMILIES = {
    "attention": attention.FAMILY,
    "adapter": adapter.FAMILY,
    "lora": lora.FAMILY,
    "low_rank": low_rank.FAMILY,
    "add_layer_norm": add_layer_norm.FAMILY,
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
MODES = ("fwd", "fwdbwd")


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
) -> list[Plan]:
    """The rows that a command line asks for. Decoding is not trained, so it has no backward."""
    return [
        Plan(FAMILIES[name], case, dtype, mode, count)
        for name in families
        for case in FAMILIES[name].cases
        if in_preset(case, preset)
        for dtype in (dtypes or case.dtypes)
        for mode in modes
        if mode == "fwd" or case.sizes.get("S") != 1
        for count in threads
    ]


def _timed(run: Run, mode: str, arguments: dict[str, Any]) -> Any:
    if mode == "fwd":

        def forward() -> None:
            with torch.no_grad():
                run()

        return forward
    wanted = leaves(arguments)
    direction = torch.randn_like(run())

    def forward_and_backward() -> None:
        torch.autograd.grad(run(), wanted, direction)

    return forward_and_backward


def rows(
    planned: list[Plan], providers: tuple[str, ...], seed: int, min_time: float
) -> Iterator[dict[str, Any]]:
    """Run the plans one by one. A provider that is wrong is not timed."""
    peaks: dict[tuple[str, int], dict[str, float]] = {}
    for plan in planned:
        torch.set_num_threads(plan.threads)
        dtype = getattr(torch, plan.dtype)
        if (plan.dtype, plan.threads) not in peaks:
            peaks[plan.dtype, plan.threads] = machine.peaks(dtype, min_time)
        yield one(plan, providers, seed, min_time, peaks[plan.dtype, plan.threads])


def one(
    plan: Plan, providers: tuple[str, ...], seed: int, min_time: float, peaks: dict[str, float]
) -> dict[str, Any]:
    """One row: every provider checked, then all that are right timed in turn."""
    family, case = plan.family, plan.case
    dtype = getattr(torch, plan.dtype)
    arguments = family.arguments(case, dtype, torch.Generator().manual_seed(seed))
    backward = plan.mode == "fwdbwd"
    checker = Checker(family, arguments, backward)
    results: dict[str, dict[str, Any]] = {}
    functions = {}
    lwft_kernels.reset_stats()
    for name, bind in family.providers.items():
        if name not in providers:
            continue
        try:
            run = bind(case, arguments)
            complaint = checker.complaint(run, ours=name == OURS)
        except NotOffered as reason:
            results[name] = {"reason": str(reason)}
            continue
        if complaint is not None:
            results[name] = {"wrong": complaint}
        else:
            results[name] = {}
            functions[name] = _timed(run, plan.mode, arguments)
    declined = [reason for count in lwft_kernels.stats().values() for reason in count["declined"]]  # type: ignore[attr-defined]
    for name, timing in interleaved(functions, min_time).items():
        results[name] = asdict(timing)
    work = 1.0 + (family.backward_flops if backward else 0.0)
    return {
        "op": family.op,
        "case": case.name,
        "sizes": dict(case.sizes),
        "curve": case.curve,
        "dtype": plan.dtype,
        "mode": plan.mode,
        "threads": plan.threads,
        "flops": case.flops * work,
        # backward reads inputs and gradients again and writes as many: about twice forward's traffic
        "bytes": case.values * dtype.itemsize * (3.0 if backward else 1.0),
        "peaks": peaks,
        "providers": results,
        "declined": declined,
    }
