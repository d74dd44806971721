"""What the GPU kernels are to reach on one H200, bfloat16, 8192 tokens, forward and backward, and what a run shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results import OURS, Row

# The sizes that say which options are on; the rest are shapes.
_OPTIONS = ("norm", "dropout_p", "float32_adapter", "prefix", "causal", "bias", "window", "softcap", "padding")
_FUSED_ATTENTION = ("sdpa", "flash", "efficient", "cudnn", "flex")


@dataclass(frozen=True)
class Goal:
    """A figure of one row that is to be at least so much.

    Attributes:
        words: what is compared.
        op, shape, options: which row: its op, sizes it must have, the options that are on.
        figure: of the row, or None where what it needs was not measured.
        least: what is to be reached; `most` where less is better.
    """

    words: str
    op: str
    shape: dict[str, Any]
    options: dict[str, Any]
    figure: Callable[[Row], float | None]
    least: float | None = None
    most: float | None = None

    def row(self, rows: Sequence[Row]) -> Row | None:
        for row in rows:
            options = {name: row.sizes[name] for name in _OPTIONS if name in row.sizes}
            shaped = all(row.sizes.get(name) == size for name, size in self.shape.items())
            if row.op == self.op and shaped and options == self.options and row.mode == "fwdbwd" and not row.in_a_row:
                return row
        return None

    def told(self, rows: Sequence[Row]) -> str:
        """The figure, bold where it misses the goal."""
        row = self.row(rows)
        figure = None if row is None else self.figure(row)
        if figure is None:
            return "-"
        reached = figure >= self.least if self.least is not None else figure <= (self.most or 0.0)
        return f"{figure:.2f}" if reached else f"**{figure:.2f}**"


def over(*providers: str) -> Callable[[Row], float | None]:
    """The time of the fastest of `providers` / ours."""

    def figure(row: Row) -> float | None:
        theirs = [median for name in providers if (median := row.median(name)) is not None]
        ours = row.median(OURS)
        if ours is None or not theirs:
            return None
        return min(theirs) / ours

    return figure


def _kept_by_middle(row: Row) -> float | None:
    """What forward keeps beside x / the (T, r) middle in float32."""
    ours = row.results.get(OURS)
    if ours is None or ours.kept_memory is None:
        return None
    return ours.kept_memory / float(4 * row.sizes["T"] * row.sizes["r"])


_ADAPTER: tuple[str, dict[str, Any], dict[str, Any]] = (
    "adapter", {"T": 8192, "d": 4096, "m": 64}, {"norm": True, "dropout_p": 0.1},
)  # fmt: skip


def _lora(width: int, **more: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    return "lora_linear", {"T": 8192, "d_in": width, "d_out": width, "r": 16}, {"dropout_p": 0.1, **more}


def _attention(**options: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    return "attention", {"D": 128}, options


GOALS = (
    Goal("adapter 4096-64-4096, LayerNorm, dropout: over eager", *_ADAPTER, over("eager"), least=3.5),
    Goal("the same: share of the limit", *_ADAPTER, Row.share_of_limit, least=0.8),
    Goal("LoRA d=4096 r=16, dropout: over eager", *_lora(4096), over("eager"), least=1.35),
    Goal("LoRA d=4096, float32 adapter: over PEFT", *_lora(4096, float32_adapter=True), over("peft"), least=1.7),
    Goal("LoRA d=2048: over eager", *_lora(2048), over("eager"), least=1.65),
    Goal("LoRA d=1024: over eager", *_lora(1024), over("eager"), least=2.1),
    Goal("LoRA d=4096: kept beside x, in (T, r) middles", *_lora(4096), _kept_by_middle, most=1.01),
    Goal("prefix 32, causal: time / without it", *_attention(prefix=32, causal=True), Row.times_beside, most=1.03),
    Goal("the same: over cat and SDPA", *_attention(prefix=32, causal=True), over("sdpa"), least=1.2),
    Goal("attention with dropout: over the best that can", *_attention(dropout_p=0.1, causal=True),
         over(*_FUSED_ATTENTION), least=2.0),
    Goal("attention with a bias gradient: over the best that can", *_attention(bias=True), over(*_FUSED_ATTENTION),
         least=2.0),
    Goal("plain causal attention: over the best SDPA", *_attention(causal=True),
         over("sdpa", "flash", "efficient", "cudnn"), least=0.8),
)  # fmt: skip


def markdown(runs: Mapping[str, Sequence[Row]]) -> str:
    """A table of the goals, one column for each of `runs`."""
    lines = [f"| goal | | {' | '.join(runs)} |", "|---" * (2 + len(runs)) + "|"]
    for goal in GOALS:
        bound = f"at least {goal.least:g}" if goal.least is not None else f"at most {goal.most:g}"
        cells = " | ".join(goal.told(rows) for rows in runs.values())
        lines.append(f"| {goal.words} | {bound} | {cells} |")
    return "\n".join(["## Goals\n", *lines]) if runs else ""
