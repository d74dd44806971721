"""residual + dropout(scale * up(act(down(layer_norm(x))))): functional, reference, autograd and module."""
