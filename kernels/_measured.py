"""Tiles that a GPU has chosen: written by ``python -m benchmarks.tune``, empty until a GPU has been asked.

Device name -> (kernel, capacity of the rank, bytes of an element) -> fields of a ``Tile``. For ``grouped_gemm`` the
second part is 0 where experts have few rows and 1 where they have many.
"""

MEASURED: dict[str, dict[tuple[str, int, int], tuple[int, int, int, int, int]]] = {}
