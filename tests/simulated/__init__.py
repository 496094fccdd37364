"""A CUDA device that is not there, for tests where there is none: host and device tensors never meet on it, either.

`hooks.cpp` makes torch believe in one device; it must be loaded before torch (`plugin`). Tensors "on" it (`device`)
keep their numbers in host memory, and every operation that a real device would refuse, it refuses: a tensor of each
side, `numpy()`, an index of the other side. Nothing is said of kernels, streams or speed.
"""
