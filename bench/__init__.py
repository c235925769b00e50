"""The benchmark suite, installed as ``robust_node_fast.bench`` and run by ``rnf bench``."""
