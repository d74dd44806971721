"""What is proven of an op on a device, case by case: numbers, the same bits twice, CUDA graphs, streams, first calls.

Everything here but graphs and streams can be tried on the CPU too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import lwft_kernels

from .case import Arguments, Case, Family, in_preset, leaves
from .correctness import Checker, Values, Verdict, evaluate
from .results import OURS
from .run import FAMILIES

# Families of whole layers hold code of others, whose bits and launches we do not answer for.
OPS = ("attention", "adapter", "lora", "low_rank", "add_layer_norm", "quantized")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check of one case.

    Attributes:
        complaint: None when it is as it must be.
        declined: why our kernels did not answer but the reference, if so.
    """

    check: str
    op: str
    case: str
    dtype: str
    complaint: str | None
    declined: str | None = None
    error: float | None = None
    allowed: float | None = None
    seconds: float | None = None

    def record(self) -> dict[str, Any]:
        return asdict(self)


def cases(name: str, presets: tuple[str, ...]) -> list[Case]:
    return [case for case in FAMILIES[name].cases if any(in_preset(case, preset) for preset in presets)]


def check(name: str, case: Case, dtype_name: str, device: torch.device) -> Iterator[Finding]:
    """Every check of one case in one dtype."""
    family, dtype = FAMILIES[name], getattr(torch, dtype_name)
    arguments = family.arguments(case, dtype, torch.Generator(device).manual_seed(0))
    checks: dict[str, Callable[[Family, Case, Arguments, torch.dtype], Verdict | str | None]] = {"numbers": _numbers}
    if name in OPS:
        checks["same bits twice"] = _repeats
        if device.type == "cuda":
            checks |= {"another stream": _on_another_stream, "CUDA graph": _in_a_graph}
    for what, run in checks.items():
        lwft_kernels.reset_stats()
        try:
            found = run(family, case, arguments, dtype)
            verdict = found if isinstance(found, Verdict) else Verdict(None, None, found)
        except Exception as failure:
            verdict = Verdict(None, None, told(failure))
        declined = [reason for counts in lwft_kernels.stats().values() for reason in counts["declined"]]
        yield Finding(
            what, family.op, case.name, dtype_name, verdict.complaint, declined[0] if declined else None,
            verdict.error, verdict.allowed,
        )  # fmt: skip


def told(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def _numbers(family: Family, case: Case, arguments: Arguments, dtype: torch.dtype) -> Verdict:
    """Against the float64 oracle."""
    checker = Checker(family, case, arguments, dtype, case.trains)
    lwft_kernels.reset_stats()  # the oracle is none of our calls
    return checker.ours(family.providers[OURS](case, arguments), case.trains)


def _ours(family: Family, case: Case, arguments: Arguments, dtype: torch.dtype) -> Values:
    """Output and gradients with dropout as the seed of `evaluate` draws it."""
    return evaluate(family.providers[OURS](case, arguments), arguments, case.trains, dtype)


def _differing(first: Values, second: Values) -> str | None:
    names = [name for name in first if not torch.equal(first[name], second[name])]
    return f"other bits: {', '.join(names)}" if names else None


def _repeats(family: Family, case: Case, arguments: Arguments, dtype: torch.dtype) -> str | None:
    return _differing(*(_ours(family, case, arguments, dtype) for _ in range(2)))


def _copied(arguments: Arguments) -> Arguments:
    """The same arguments in memory of their own; what is one tensor stays one."""
    made: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            target = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            made[id(value)] = target.copy_(value.detach()).requires_grad_(value.requires_grad)
        return made[id(value)]

    return {name: copy(value) for name, value in arguments.items()}


def _assign(targets: Arguments, sources: Arguments) -> None:
    """Write the numbers of `sources` into the memory of `targets`."""
    with torch.no_grad():
        for name, target in targets.items():
            if isinstance(target, Tensor) and target.is_floating_point():
                target.copy_(sources[name])


def _on_another_stream(family: Family, case: Case, arguments: Arguments, dtype: torch.dtype) -> str | None:
    """The numbers arrive on the stream, late: a launch on any other stream would compute with zeros."""
    expected = _ours(family, case, arguments, dtype)
    late = _copied(arguments)
    _assign(late, {name: torch.zeros_like(v) for name, v in late.items() if isinstance(v, Tensor)})
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        _assign(late, arguments)
        found = _ours(family, case, late, dtype)
    stream.synchronize()
    return _differing(expected, found)


def _in_a_graph(family: Family, case: Case, arguments: Arguments, dtype: torch.dtype) -> str | None:
    """Forward and backward captured, replayed on other numbers than those it was captured with."""
    random = bool(arguments.get("dropout_p"))
    fixed = _copied(arguments)
    run = family.providers[OURS](case, fixed)
    wanted = list(leaves(fixed).values())

    def step() -> list[Tensor]:
        if not case.trains:
            with torch.no_grad():
                return [run()]
        out = run()
        return [out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    device = results[0].device
    _assign(fixed, family.arguments(case, dtype, torch.Generator(device).manual_seed(1)))

    def replayed(seed: int | None) -> Values:
        if seed is not None:
            torch.manual_seed(seed)
        graph.replay()
        torch.cuda.synchronize()
        return {str(position): value.clone() for position, value in enumerate(results)}

    if random:
        first, next_, again = replayed(5), replayed(None), replayed(5)
        if torch.equal(first["0"], next_["0"]):
            return "two replays drop the same elements"
        return _differing(first, again)
    return _differing(replayed(None), {str(position): value for position, value in enumerate(step())})


def first_calls(name: str, preset: str, dtype_name: str, device: torch.device) -> Iterator[Finding]:
    """How long the first call of an op takes, forward and backward, the next one, and the first with other sizes."""
    family, dtype = FAMILIES[name], getattr(torch, dtype_name)
    case, *others = (case for case in cases(name, (preset,)) if case.trains)
    other = next(other for other in others if other.sizes.keys() == case.sizes.keys())
    for what, tried in (("first call", case), ("second call", case), ("first call of other sizes", other)):
        arguments = family.arguments(tried, dtype, torch.Generator(device).manual_seed(0))
        run = family.providers[OURS](tried, arguments)
        start = time.perf_counter()
        out = run()
        torch.autograd.grad(out, list(leaves(arguments).values()), torch.ones_like(out))
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield Finding(what, family.op, tried.name, dtype_name, None, seconds=time.perf_counter() - start)


def run_once(name: str, case: Case, dtype_name: str, device: torch.device) -> Finding:
    """One call of ours, forward and backward: what it compiles is there for later ones; with LWFT_AUTOTUNE=full it is
    what tunes."""
    family, dtype = FAMILIES[name], getattr(torch, dtype_name)
    start = time.perf_counter()
    complaint = None
    try:
        arguments = family.arguments(case, dtype, torch.Generator(device).manual_seed(0))
        _ours(family, case, arguments, dtype)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as failure:
        complaint = told(failure)
    return Finding("a call", family.op, case.name, dtype_name, complaint, seconds=time.perf_counter() - start)
