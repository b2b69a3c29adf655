"""The workshop: parts for curating, extracting, aligning, distilling and evaluating, with no opinion about their order.

The recipes in ``mmkd.train`` and ``mmkd.hub`` put the parts together; the model itself lives in ``modeling_mmkd``.
"""

__version__ = "0.1.0"
