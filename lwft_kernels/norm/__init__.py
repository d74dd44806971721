"""LayerNorm(x + dropout(sublayer_out)): functional, reference, autograd and module."""
