"""Verify and assess CUDA and Triton kernels on a machine without a GPU."""
