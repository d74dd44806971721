"""Attention with bias, mask, prefix, window and dropout: functional, reference, autograd and modules."""
