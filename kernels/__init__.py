"""Triton kernels, installed as ``robust_node_fast.kernels``. This release has none yet; GPU tensors run the reference."""
