"""A pytest plugin: every call of a transformers model on "sdpa" is a call of that model accelerated.

`pytest -p accelerated_models` with this directory on PYTHONPATH. A model is accelerated for the length of its
outermost call (of `generate`, the whole of it), so that tests which compare the implementations by name compare ours
under "sdpa".
"""

from __future__ import annotations

import functools
from collections import Counter

import torch
from transformers import GenerationMixin, PreTrainedModel

import lwft_kernels

_calls: Counter[str] = Counter()
_reasons: Counter[str] = Counter()
_under_way = False


def _accelerated(original):
    @functools.wraps(original)
    def call(self, *args, **kwargs):
        global _under_way
        # what torch.compile traces is the model as it is
        if _under_way or torch.compiler.is_compiling() or self.config._attn_implementation != "sdpa":
            return original(self, *args, **kwargs)
        _under_way = True
        report = lwft_kernels.accelerate(self)
        _calls["accelerated" if report.replaced else "left as it was"] += 1
        try:
            return original(self, *args, **kwargs)
        finally:
            _under_way = False
            # checkpointed layers run again in backward, and must do the same
            if not any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
                report.undo()

    return call


def pytest_configure(config):
    PreTrainedModel.__call__ = _accelerated(torch.nn.Module.__call__)
    GenerationMixin.generate = _accelerated(GenerationMixin.generate)


def pytest_runtest_teardown(item):
    for op, counts in lwft_kernels.stats().items():
        _calls[f"{op}: fast"] += counts["fast"]
        _reasons.update({f"{op}: {reason}": count for reason, count in counts["declined"].items()})
    lwft_kernels.reset_stats()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("lwft_kernels")
    for name, count in (*sorted(_calls.items()), *_reasons.most_common()):
        terminalreporter.write_line(f"{count:8d}  {name}")
