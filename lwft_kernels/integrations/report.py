"""What `accelerate` did: one line per module, as data and as a table, and the way back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from lwft_kernels import backend
from lwft_kernels.integrations import reached

if TYPE_CHECKING:
    from rich.console import Group


@dataclass
class Change:
    """One module that was replaced, or could not be.

    Attributes:
        module: its name in the model.
        was: what computed it before.
        now: what computes it from here on; None when it stays as it was.
        reason: why it stays as it was; None when it was replaced.
        apply: replaces it; returns the reason where that turned out not to be possible.
        revert: restores the exact object, unless somebody else has changed it since.
    """

    module: str
    was: str
    now: str | None = None
    reason: str | None = None
    apply: Callable[[], str | None] = field(default=lambda: None, repr=False)
    revert: Callable[[], None] = field(default=lambda: None, repr=False)


class Report:
    """The changes of one call of `accelerate` (or of `explain`, which changes nothing).

    Printed, it is a table in which numbered layers that are alike share a line; `table(every=True)` has them all. With
    `rich` installed, ``rich.print(report)`` draws it.

    Attributes:
        changes: every module looked at, in the order of the model.
        versions: the libraries that were found, by name.
    """

    def __init__(self, model: nn.Module, changes: list[Change], versions: dict[str, str], *, applied: bool) -> None:
        self.changes = changes
        self.versions = versions
        self._state = "applied" if applied else "planned"
        # Weakly: a report that is kept must not keep a model.
        self._modules: dict[str, weakref.ref[nn.Module]] = {}
        if applied:
            modules = dict(model.named_modules(remove_duplicate=False))
            for change in self.replaced:
                if change.module in modules:
                    self._modules[change.module] = weakref.ref(modules[change.module])
                    reached.forget(modules[change.module])

    @property
    def replaced(self) -> list[Change]:
        """The changes that put one of our kernels in place."""
        return [change for change in self.changes if change.now is not None]

    @property
    def declined(self) -> list[Change]:
        """The modules that stay as they were, each with a reason."""
        return [change for change in self.changes if change.now is None]

    def unreached(self) -> list[Change]:
        """The replaced modules that no fast call has reached yet. After a step of training there should be none.

        Either nobody calls them, or every call was declined: `lwft_kernels.stats` has the reasons. Under torch.compile
        a module counts as reached when one of its class was traced.
        """
        found = []
        for change in self.replaced:
            module = self._modules.get(change.module, lambda: None)()
            if module is not None and not reached.is_reached(module):
                found.append(change)
        return found

    def undo(self) -> None:
        """Restore the exact original classes and settings. Doing it twice does nothing.

        What somebody else has changed since stays as they left it.
        """
        if self._state != "applied":
            return
        for change in reversed(self.replaced):
            change.revert()
        self._state = "undone"

    def table(self, *, every: bool = False) -> str:
        """The report as text. `every`: one line for each module, instead of one for all that differ by a number."""
        if not self.changes:
            return self._summary()[0]
        rows = [_HEADER, *self._rows(every)]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines = ["  ".join((row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2])) for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join((*lines, *self._summary()))

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(*_HEADER)
        for row in self._rows(every=False):
            table.add_row(*(Text(cell) for cell in row))
        return Group(*([table] if self.changes else []), *(Text(line) for line in self._summary()))

    def _rows(self, every: bool) -> list[tuple[str, str, str]]:
        alike: dict[tuple[str, str], list[str]] = {}
        for change in self.changes:
            now = change.now if change.now is not None else f"unchanged: {change.reason}"
            alike.setdefault((change.was, now), []).append(change.module or "(the model)")
        order = {change.module or "(the model)": index for index, change in reversed([*enumerate(self.changes)])}
        rows = []
        for (was, now), names in alike.items():
            for first, name in ((name, name) for name in names) if every else _ranges(names):
                rows.append((order[first], (name, was, now)))
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]

    def _summary(self) -> list[str]:
        """What stands below the table."""
        found = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        if not self.changes:
            return [f"lwft_kernels.accelerate: nothing to replace ({found})"]
        state = {"planned": ", once accelerated", "applied": "", "undone": ", and restored since"}[self._state]
        lines = [f"{len(self.replaced)} of {len(self.changes)} replaced{state} ({found})"]
        if self._state == "applied" and self._modules:
            lines += self._calls()
        return lines

    def _calls(self) -> list[str]:
        unreached = self.unreached()
        if not unreached:
            return ["all of them reached by fast calls"]
        total = len(self._modules)
        lines = [f"{total - len(unreached)} of {total} reached by fast calls so far"]
        declined = [
            f"  {op}: {count} x {reason}"
            for op, counts in backend.stats().items()
            for reason, count in counts["declined"].items()
        ]
        if len(unreached) < total or declined:
            lines += [f"never reached: {name}" for _, name in _ranges([c.module or "(the model)" for c in unreached])]
        if declined:
            lines += ["calls declined in this process:", *declined]
        return lines


_HEADER = ("module", "was", "now, or why not")


def _ranges(names: Iterable[str]) -> list[tuple[str, str]]:
    """Names that differ by numbers only, joined: the first name of each group, and ``model.layers.0-31.mlp``."""
    # By pattern: a first name, and the numbers in each place where the pattern has one.
    members: dict[tuple[str, ...], list[tuple[str, tuple[frozenset[int], ...]]]] = {}
    for name in names:
        parts = name.split(".")
        pattern = tuple("#" if part.isdecimal() else part for part in parts)
        numbers = tuple(frozenset({int(part)}) for part in parts if part.isdecimal())
        members.setdefault(pattern, []).append((name, numbers))
    joined = []
    for pattern, entries in members.items():
        for place in reversed(range(len(entries[0][1]))):  # the innermost first: experts, then layers
            merged: dict[tuple[frozenset[int], ...], tuple[str, frozenset[int]]] = {}
            for first, sets in entries:
                others = (*sets[:place], *sets[place + 1 :])
                before = merged.get(others)
                merged[others] = (first, sets[place]) if before is None else (before[0], before[1] | sets[place])
            entries = [(first, (*o[:place], numbers, *o[place:])) for o, (first, numbers) in merged.items()]
        for first, sets in entries:
            texts = iter(sets)
            joined.append((first, ".".join(_spans(next(texts)) if part == "#" else part for part in pattern)))
    return joined


def _spans(numbers: frozenset[int]) -> str:
    """``{0, 1, 2, 5}`` as ``0-2,5``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in spans)
