"""Scaled dot-product attention with bias, mask, prefix, window and dropout: functional, reference, autograd, modules."""
