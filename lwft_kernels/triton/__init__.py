"""What the Triton kernels of all rooms share: the launch, the choice of a configuration, random draws, reductions.

The kernels of an op stand in its room: `triton_kernels.py` (device code), `triton_op.py` (tensors to launches),
`triton_calls.py` (the calls that are compiled ahead of time). Nothing here is imported before the first call on a GPU.
"""
