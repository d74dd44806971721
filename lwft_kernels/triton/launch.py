"""One way to launch a kernel: with a configuration chosen among candidates, or only written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from triton.runtime.errors import OutOfResources

from lwft_kernels.triton import tuning
from lwft_kernels.triton.cards import card_of
from lwft_kernels.triton.tuning import Configuration

Result = TypeVar("Result")
Grid = Callable[[Configuration], tuple[int, ...]]


@dataclass(frozen=True)
class Launch:
    """A launch that was written down instead of run.

    Attributes:
        kernel: the `triton.jit` function.
        args: its positional arguments.
        constants: its compile-time arguments, those of the configuration among them.
        configuration: with which it would have run.
    """

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    configuration: Configuration


_recorded: list[Launch] | None = None


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches of `call`, one per candidate configuration. Nothing runs, so its tensors may be meta tensors."""
    global _recorded
    found: list[Launch] = []
    _recorded = found
    try:
        call()
    finally:
        _recorded = None
    return found


def launch(
    kernel: Any,
    *args: Any,
    grid: Grid,
    candidates: Sequence[Configuration],
    band: tuple[Any, ...] = (),
    **constants: Any,
) -> None:
    """Run `kernel` once.

    Args:
        kernel: a `triton.jit` function. It must write its results only, so that running it again does no harm.
        args: its positional arguments.
        grid: the number of programs, given the configuration.
        candidates: the configurations that may serve the call. The first is the one for a card nobody has measured.
        band: what the best choice depends on: sizes (in bands, see `tuning.size_band`), dtypes, options.
        constants: compile-time arguments that are not the configuration's.
    """
    if _recorded is not None:
        _recorded.extend(Launch(kernel, args, {**constants, **c.blocks}, c) for c in candidates)
        return

    def run(configuration: Configuration) -> None:
        kernel[grid(configuration)](
            *args,
            **constants,
            **configuration.blocks,
            num_warps=configuration.num_warps,
            num_stages=configuration.num_stages,
        )

    chosen = candidates[0]
    if len(candidates) > 1:
        chosen = tuning.choose(kernel.__name__, card_of(_device(args)), band, candidates, run)
    try:
        run(chosen)
    except OutOfResources as error:  # a card with less of everything than those that were thought of
        _run_another(kernel.__name__, [c for c in candidates if c is not chosen], run, _device(args), error)


def _device(args: tuple[Any, ...]) -> torch.device:
    return next(a.device for a in args if isinstance(a, torch.Tensor))


def _run_another(
    name: str,
    candidates: Sequence[Configuration],
    run: Callable[[Configuration], None],
    device: torch.device,
    refused: OutOfResources,
) -> None:
    for configuration in candidates:
        try:
            return run(configuration)
        except OutOfResources as error:
            refused = error
    raise RuntimeError(
        f"{name}: none of its configurations fits this card, {card_of(device).name} ({refused}); use "
        "lwft_kernels.use_backend('reference') or LWFT_BACKEND=reference"
    ) from refused


def launch_one_of(
    name: str, implementations: Mapping[str, Callable[[], Result]], *, device: torch.device, band: tuple[Any, ...]
) -> Result:
    """The result of one of several ways to compute the same.

    Args:
        name: of what is computed, under which the choice is kept.
        implementations: by name, each to be run as often as it is called. The first is the one for a card nobody has
            measured.
        device: on which they run.
        band: as in `launch`.
    """
    if _recorded is not None:
        first, *_ = [run() for run in implementations.values()]  # all of them, for their launches
        return first
    if len(implementations) == 1:
        (only,) = implementations.values()
        return only()
    names = tuple(implementations)
    return implementations[tuning.choose(name, card_of(device), band, names, lambda n: implementations[n]())]()
