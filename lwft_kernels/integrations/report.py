"""What `accelerate` did: one line per module, as data and as a table, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


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

    Attributes:
        changes: every module looked at, in the order of the model.
        versions: the libraries that were found, by name.
    """

    def __init__(self, changes: list[Change], versions: dict[str, str], *, applied: bool) -> None:
        self.changes = changes
        self.versions = versions
        self._applied = applied

    @property
    def replaced(self) -> list[Change]:
        """The changes that put one of our kernels in place."""
        return [change for change in self.changes if change.now is not None]

    @property
    def declined(self) -> list[Change]:
        """The modules that stay as they were, each with a reason."""
        return [change for change in self.changes if change.now is None]

    def undo(self) -> None:
        """Restore the exact original classes and settings. Doing it twice does nothing.

        What somebody else has changed since stays as they left it.
        """
        if not self._applied:
            return
        for change in reversed(self.replaced):
            change.revert()
        self._applied = False

    def __str__(self) -> str:
        found = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        if not self.changes:
            return f"lwft_kernels.accelerate: nothing to replace ({found})"
        header = ("module", "was", "now, or why not")
        rows = [(c.module, c.was, c.now if c.now is not None else f"unchanged: {c.reason}") for c in self.changes]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in (0, 1)]
        lines = ["  ".join((row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2])) for row in (header, *rows)]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(f"{len(self.replaced)} of {len(self.changes)} replaced ({found})")
        return "\n".join(lines)

    __repr__ = __str__
