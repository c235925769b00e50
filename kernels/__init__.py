"""Triton kernels, installed as ``robust_node_fast.kernels``. Importing this package imports no Triton yet."""
