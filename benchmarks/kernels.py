"""The table of `lwft-bench kernels`: what Triton's compiler makes of every call of the rooms, for every class of cards.

No GPU is needed. The compiling is done in processes of their own: where the calling process has ``TRITON_INTERPRET``
set, Triton compiles nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOMS = ("attention", "adapter", "lowrank", "norm", "quantized")

Record = dict[str, Any]  # the fields of `lwft_kernels.triton.ahead_of_time.Compiled`


def card_names() -> tuple[str, ...]:
    """The classes of cards, by the word their names begin with: sm_90."""
    from lwft_kernels.triton import cards

    return tuple(card.name.split()[0] for card in cards.CLASSES)


def compiled(
    rooms: Sequence[str] = ROOMS, cards: Sequence[str] = (), jobs: int = 1, cache: Path | None = None
) -> Iterator[Record]:
    """Compile every launch of every call of `rooms` for `cards`, in the order in which the compiler is done with them.

    Args:
        cards: names as those of `card_names`; none means all.
        jobs: how many processes.
        cache: Triton's cache. Default: a new one that is deleted afterwards, so that nothing old is taken for new.

    Raises:
        ValueError: a room or card that is not there, or `jobs` < 1.
        RuntimeError: a compiling process ended, with the end of what it said.
    """
    names = card_names()
    for word, known in [*((room, ROOMS) for room in rooms), *((card, names) for card in cards)]:
        if word not in known:
            raise ValueError(f"{word!r} is not one of {', '.join(known)}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    with tempfile.TemporaryDirectory() as folder:
        yield from _compiled(list(itertools.product(rooms, cards or names)), jobs, cache or Path(folder))


def _compiled(units: list[tuple[str, str]], jobs: int, cache: Path) -> Iterator[Record]:
    """Every unit, a room and a card, is compiled by whichever worker is free."""
    waiting: queue.Queue[tuple[str, str]] = queue.Queue()
    for unit in units:
        waiting.put(unit)
    found: queue.Queue[Record | Exception | None] = queue.Queue()  # None: a worker has nothing left to do
    workers = [_start(cache) for _ in range(min(jobs, len(units)))]
    try:
        for worker in workers:
            threading.Thread(target=_feed, args=(worker, waiting, found), daemon=True).start()
        running = len(workers)
        while running:
            record = found.get()
            if record is None:
                running -= 1
            elif isinstance(record, Exception):
                raise record
            else:
                yield record
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _start(cache: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", f"{__package__}.kernels"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def _feed(
    worker: subprocess.Popen[str],
    waiting: queue.Queue[tuple[str, str]],
    found: queue.Queue[Record | Exception | None],
) -> None:
    """Hand units to `worker` until none is left; what it prints goes to `found`."""
    assert worker.stdin is not None and worker.stdout is not None and worker.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(worker.stderr or ()), daemon=True)
    reader.start()  # a full pipe of warnings would stop the worker
    while True:
        try:
            unit = waiting.get_nowait()
        except queue.Empty:
            found.put(None)
            return
        with contextlib.suppress(OSError):  # it has ended, and stdout below says so
            print(json.dumps(unit), file=worker.stdin, flush=True)
        for line in worker.stdout:
            record = json.loads(line)
            if record is None:  # the unit is done
                break
            found.put(record)
        else:
            reader.join(10)
            said = "".join(errors)[-2000:]
            found.put(RuntimeError(f"compiling {unit[0]} for {unit[1]} ended the process:\n{said}"))
            return


def _work() -> None:
    """A worker: one unit a line of stdin; a line of stdout per launch compiled, and null when the unit is done."""
    from dataclasses import asdict

    from lwft_kernels.triton import ahead_of_time, cards

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print; only records are to be read there
    for line in sys.stdin:
        room, name = json.loads(line)
        chosen = [card for card in cards.CLASSES if card.name.split()[0] == name]
        for record in ahead_of_time.compile_all((room,), chosen):
            print(json.dumps(asdict(record)), file=answers, flush=True)
        print("null", file=answers, flush=True)


def print_tables(records: Sequence[Record], console: Console) -> None:
    """A table per room; below each, its faults."""
    for room in dict.fromkeys(record["room"] for record in records):
        members = [record for record in records if record["room"] == room]
        table = Table(title=room, title_justify="left", title_style="bold")
        for column in ("call", "kernel", "configuration", "card"):
            table.add_column(column, overflow="fold")
        for column in ("regs", "shared", "stack", "spills", "prog/MP"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("matrix")
        table.add_column("faults", justify="right")
        previous = None
        for record in sorted(members, key=lambda r: (r["call"], r["kernel"], r["card"], r["configuration"])):
            if previous not in (None, record["call"]):
                table.add_section()
            previous = record["call"]
            numbers = ("registers", "shared_memory", "stack", "spills", "programs_per_multiprocessor")
            table.add_row(
                escape(record["call"]),
                record["kernel"].removesuffix("_kernel"),
                escape(record["configuration"]),
                record["card"].split()[0],
                *(str(record[name]) for name in numbers),
                ", ".join(record["matrix_instructions"]),
                f"[bold red]{len(record['faults'])}[/]" if record["faults"] else "",
            )
        console.print(table)
        for record in members:
            where = f"{record['call']}, {record['kernel']}, {record['configuration']}, {record['card']}"
            for fault in record["faults"]:
                console.print(f"  {where}: {fault}", style="red", highlight=False, markup=False)


if __name__ == "__main__":
    _work()
