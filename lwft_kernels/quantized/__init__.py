"""quantized_linear: functional, reference, autograd and the holder of a quantised weight."""
