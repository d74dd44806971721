"""low_rank_linear, lora_linear, lora_delta_: functional, reference, autograd and modules."""
