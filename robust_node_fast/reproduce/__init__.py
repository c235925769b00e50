"""``rnf reproduce cnode``: the experiments of arXiv 2508.11432 as a grid of cells, each one resumable JSON file."""

from robust_node_fast.reproduce.cell import CellError, CellResult, compute, load, read
from robust_node_fast.reproduce.grid import Cell, cells
from robust_node_fast.reproduce.plot import attacked_and_certified
from robust_node_fast.reproduce.summary import by_row, markdown, table

__all__ = [
    "Cell",
    "CellError",
    "CellResult",
    "attacked_and_certified",
    "by_row",
    "cells",
    "compute",
    "load",
    "markdown",
    "read",
    "table",
]
