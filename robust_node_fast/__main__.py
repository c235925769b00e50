"""``python -m robust_node_fast``: the command line."""

from robust_node_fast.cli import main

main()
