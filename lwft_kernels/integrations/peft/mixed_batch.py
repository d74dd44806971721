"""A batch of which every row has an adapter of its own, in training as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from peft.tuners.lora import LoraModel
from torch import nn


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within the block, row i of every batch goes through the LoRA adapter ``adapter_names[i]``.

    As PEFT's argument ``adapter_names``, which PEFT refuses in training: here every adapter gets the gradient of its
    rows. Call backward within the block too, so that what gradient checkpointing computes again is the same.

    Args:
        model: a `PeftModel` with LoRA adapters, or a module that contains one.
        adapter_names: as long as the batch; ``"__base__"`` for the base model alone.

    Raises:
        ValueError: there is no LoRA adapter in `model`, or none of that name.
    """
    tuners = [module for module in model.modules() if isinstance(module, LoraModel)]
    if not tuners:
        raise ValueError(f"mixed_batch: {type(model).__name__} has no LoRA adapters")
    with ExitStack() as stack:
        for tuner in tuners:
            training, tuner.training = tuner.training, False  # its own flag alone, which PEFT asks
            try:
                stack.enter_context(tuner._enable_peft_forward_hooks(adapter_names=list(adapter_names)))
            finally:
                tuner.training = training
        yield
