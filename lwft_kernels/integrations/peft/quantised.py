"""PEFT's LoRA layers for quantised bases: the base computes itself, the adapters are added by `lora_delta_`.

Most of PEFT's classes exist only where the library that quantises is installed, and importing them imports it. So ours
are derived when a model has one.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor, nn

from lwft_kernels.integrations.peft.lora_layer import lora_forward

# Whether the class hands further arguments, adapter_names among them, on; the rest take x alone.
_TAKES_ARGUMENTS = {
    "peft.tuners.lora.aqlm.AqlmLoraLinear": False,
    "peft.tuners.lora.awq.AwqLoraLinear": False,
    "peft.tuners.lora.bnb.Linear4bit": True,
    "peft.tuners.lora.bnb.Linear8bitLt": True,
    "peft.tuners.lora.eetq.EetqLoraLinear": False,
    "peft.tuners.lora.gptq.GPTQLoraLinear": False,
    "peft.tuners.lora.hqq.HqqLoraLinear": True,
    "peft.tuners.lora.inc.IncLoraLinear": True,
    "peft.tuners.lora.torchao.TorchaoLoraLinear": True,
}


@functools.cache
def derived(upstream: Any) -> type[nn.Module] | None:
    """Our subclass of one of PEFT's classes for quantised bases, or None where it is no such class."""
    takes_arguments = _TAKES_ARGUMENTS.get(f"{upstream.__module__}.{upstream.__qualname__}")
    if takes_arguments is None:
        return None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        served = lora_forward(self, x, args, kwargs) if takes_arguments or not (args or kwargs) else None
        if served is not None:
            return served
        declined: Tensor = upstream.forward(self, x, *args, **kwargs)
        return declined

    about = f"`{upstream.__module__}.{upstream.__name__}` on `lora_delta_`."
    members = {"__module__": __name__, "__doc__": about, "forward": forward}
    return type(upstream.__name__, (upstream,), members)


def __getattr__(name: str) -> type[nn.Module]:
    """Where pickle finds a derived class."""
    for qualified in _TAKES_ARGUMENTS:
        module, _, known = qualified.rpartition(".")
        if name == known:
            ours = derived(getattr(importlib.import_module(module), name))
            assert ours is not None
            return ours
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
