"""The ops as Triton kernels; installed and imported as `jz3.kernels`."""
