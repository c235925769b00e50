"""``rnf reproduce cnode``: the experiments of arXiv 2508.11432 as a grid of cells, each one resumable JSON file."""

from robust_node_fast.reproduce.cell import Stored, compute, stored
from robust_node_fast.reproduce.grid import Cell, cells
from robust_node_fast.reproduce.summary import by_part, table, write

__all__ = ["Cell", "Stored", "by_part", "cells", "compute", "stored", "table", "write"]
