"""Settings of the model in training, separate from `mmkd.student.trainable` so that ``--help`` needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmkd.command.settings import setting


@dataclass(kw_only=True)
class ModelSettings:
    """Settings of the model that every kind of training has."""

    GROUP: ClassVar[str] = "model"

    freeze: list[str] = setting(
        factory=list, help="frozen modules: vision_model, text_model.embeddings, text_model[:4]"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, more time")
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = setting(
        None, "attention implementation, by default torch's choice; flash needs its package, a GPU and bf16"
    )
    compile: bool = setting(False, "compile the towers: minutes at the start, then faster steps; not the same bytes")
