"""The feature store, and the names of its kinds and number formats."""

from typing import Literal

FeatureKind = Literal["raw", "aligned"]
FeatureType = Literal["float16", "float32", "bfloat16"]
