"""A pytest plugin: every model that gets PEFT adapters is accelerated, when it gets them and before every call.

`pytest -p accelerated_peft` with this directory on PYTHONPATH.
"""

from __future__ import annotations

import functools
from collections import Counter

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner

import lwft_kernels

_counts: Counter[str] = Counter()


def _accelerated_before(original):
    @functools.wraps(original)
    def call(self, *args, **kwargs):
        if not torch.compiler.is_compiling():
            lwft_kernels.accelerate(self)
        return original(self, *args, **kwargs)

    return call


def _accelerated_after(original):
    @functools.wraps(original)
    def inject_adapter(self, model, *args, **kwargs):
        result = original(self, model, *args, **kwargs)
        lwft_kernels.accelerate(model)
        return result

    return inject_adapter


def pytest_configure(config):
    BaseTuner.inject_adapter = _accelerated_after(BaseTuner.inject_adapter)
    peft.PeftModel.__call__ = _accelerated_before(torch.nn.Module.__call__)
    peft.PeftModelForCausalLM.generate = _accelerated_before(peft.PeftModelForCausalLM.generate)


def pytest_runtest_teardown(item):
    for op, counts in lwft_kernels.stats().items():
        _counts[f"{op}: fast"] += counts["fast"]
        _counts.update({f"{op}: {reason}": count for reason, count in counts["declined"].items()})
    lwft_kernels.reset_stats()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("lwft_kernels")
    for name, count in sorted(_counts.items()):
        terminalreporter.write_line(f"{count:8d}  {name}")
