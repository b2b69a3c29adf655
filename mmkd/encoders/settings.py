"""The settings of an extraction.

They are apart from the recipe, which worker processes do not import, and from modules that import torch, since help and
misspelt options are answered before that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mmkd.command.settings import setting
from mmkd.command.tasks import TaskSettings
from mmkd.data.features import FeatureType

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(kw_only=True)
class ExtractSettings(TaskSettings):
    """Extract the features of one or more teachers for every pair.

    Example:
        mmkd extract --teacher biomedclip,plip --pairs pairs --output features
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "model": "weights precision resize",
        "data": "dtype shard_size",
        "computing": "batch_size threads device cache_frozen_towers quiet",
    }

    teacher: list[str] = setting(
        help="names, folders, Hub ids or YAML files, also as NAME=SOURCE; ungated and commercial filter them"
    )
    pairs: Path = setting(help="folder of pairs")
    output: Path = setting(help="folder to write: one feature store for each teacher; existing features are kept")
    weights: dict[str, str] = setting(factory=dict, help="local folder of the weights, by teacher")
    dtype: FeatureType = setting("float16", "stored number format")
    precision: Precision = setting("float32", "precision of the forward pass; tf32 and bfloat16 are faster on GPUs")
    resize: Literal["exact", "fast"] = setting(
        "exact",
        "the teacher's own, or five times as fast and within one grey level (usual preprocessing only)",
    )
    batch_size: int = setting(32, "images per batch of a teacher", least=1)
    shard_size: int = setting(0, "pairs per shard, the most a killed run loses; 0 chooses 256 to 16384", least=0)
    threads: int = setting(0, "threads that read and prepare images; 0 takes this process' share of the cores", least=0)
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one, another for each process")
    cache_frozen_towers: Path | None = setting(
        None, "folder for the outputs of frozen towers; models of this package that share towers encode with them once"
    )
    quiet: bool = setting(False, "no progress bar")
