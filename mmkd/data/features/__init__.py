"""The feature store, the names of its kinds and number formats, and what identifies the vectors of an encoder."""

from typing import Literal

FeatureKind = Literal["raw", "aligned"]
FeatureType = Literal["float16", "float32", "bfloat16"]

IDENTITY = ("fingerprint", "preprocessing", "tokenizer", "context", "pooling", "precision")  # of its provenance
