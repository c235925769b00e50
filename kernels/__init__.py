"""Triton kernels, installed as ``robust_node_fast.kernels``. None yet: GPU tensors run the reference, and say so."""
