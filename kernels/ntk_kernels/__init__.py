"""Contractions of gradient factors on GPUs: Triton kernels, and the float64 references they are held to.

Nothing here needs Triton to be imported; a launch without it says what to install.
"""
