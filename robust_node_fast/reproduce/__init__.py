"""``rnf reproduce cnode`` and ``cifar``: the experiments of arXiv 2508.11432 as cells, each one resumable JSON file."""

from robust_node_fast.reproduce.cell import CellError, CellResult, compute, load, path_of, read
from robust_node_fast.reproduce.cifar import cifar_markdown, cifar_picture
from robust_node_fast.reproduce.grid import SEEDS, Cell, cells, cifar_cells
from robust_node_fast.reproduce.plot import attacked_and_certified
from robust_node_fast.reproduce.summary import by_row, markdown, table

__all__ = [
    "SEEDS",
    "Cell",
    "CellError",
    "CellResult",
    "attacked_and_certified",
    "by_row",
    "cells",
    "cifar_cells",
    "cifar_markdown",
    "cifar_picture",
    "compute",
    "load",
    "markdown",
    "path_of",
    "read",
    "table",
]
