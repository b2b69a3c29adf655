"""Stage 1: contrastive pretraining on image-text pairs.

The same recipe trains a generalist student and, on some of the modalities or labels, a specialist teacher. Reads
``pairs/``, writes a folder for ``from_pretrained``.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from transformers.utils.logging import disable_progress_bar

from mmkd.data.frozen_batches import training_batches
from mmkd.data.held_out import split_off
from mmkd.data.pair_table import in_columns, take_rows
from mmkd.data.records import Pair, PairFolder, open_pairs
from mmkd.loop import LoopSettings, fit, start
from mmkd.objectives import ContrastiveObjective
from mmkd.provenance import training_provenance
from mmkd.settings import nearest, resolved, run, setting
from mmkd.student import save_student
from mmkd.towers import starting_student
from mmkd.trainable import ModelSettings, make_trainable
from mmkd.validation import ValidationSettings, validation_of
from modeling_mmkd import PRESETS


@dataclass(kw_only=True)
class PretrainSettings(LoopSettings, ModelSettings, ValidationSettings):
    """Contrastive pretraining of a student, or of a specialist teacher."""

    pairs: Path = setting(help="folder of pairs; the training split is used")
    model: str | None = setting(None, "folder or Hub id of a student to start from, instead of vision and text")
    preset: str | None = setting(
        None, f"a named size with random weights and the tokenizer of text: {', '.join(PRESETS)}"
    )
    vision: str = setting("packaged:efficientnet-lite0", "starting weights of the vision tower")
    text: str = setting("packaged:all-minilm-l6-v2", "starting weights of the text tower")
    projection_dim: int = setting(512, "width of the common space")
    image_size: int | None = setting(None, "side of the images in pixels, by default the vision tower's")
    text_layers: int | None = setting(None, "keep only the first layers of the text tower")
    vision_projection_hidden: int | None = setting(None, "hidden width of the image projection; none = one layer")
    text_projection_hidden: int | None = setting(None, "hidden width of the text projection; none = mean of its ends")
    modalities: list[str] = setting(factory=list, help="keep only pairs of these modalities")
    labels: list[str] = setting(factory=list, help="keep only pairs of these labels")
    sources: list[str] = setting(factory=list, help="keep only pairs of these collections")
    part: str | None = setting(None, "keep one share of the groups, such as 1/3")
    gather_gradient: bool = setting(
        True,
        "gradient through what other processes compare with; false as released: another model on several processes",
    )
    crop: Literal["random", "center"] = setting("random", "crop of training images: 90-100 % of the area, or none")
    cache_frozen_towers: Path | None = setting(
        None, "folder for the outputs of frozen towers, encoded once for all runs that name it; needs --crop center"
    )


def main(settings: PretrainSettings) -> None:
    """Train and write the folder."""
    accelerator = start(settings)
    if settings.quiet:
        disable_progress_bar()
    folder, held_out = split_off(open_pairs(settings.pairs, "train"), settings.hold_out)
    pairs = select(folder.pairs, settings.modalities, settings.labels, settings.part, settings.sources)
    if settings.model is None and settings.preset is not None:
        refuse_other_sizes(settings)
    model, processor = starting_student(resolved(settings))
    make_trainable(model, settings)
    chosen = PairFolder(folder.path, folder.image_root, pairs)
    batches = training_batches(
        settings.cache_frozen_towers,
        chosen,
        model,
        processor,
        batch_size=settings.batch_size,
        crop=settings.crop,
        workers=settings.workers,
        seed=settings.seed,
        quiet=settings.quiet,
    )
    validation = validation_of(
        settings,
        settings.pairs,
        processor,
        held_out=held_out,
        batch_size=settings.batch_size,
        workers=settings.workers,
        seed=settings.seed,
    )
    objective = ContrastiveObjective(model, settings.gather_gradient)
    started_from = [settings.vision, settings.text]
    if settings.model is not None or settings.preset is not None:
        started_from = [settings.model] if settings.model is not None else []
    provenance = training_provenance("pretrain", chosen, started_from)
    fit(
        accelerator,
        objective,
        batches,
        settings,
        lambda path: save_student(path, model, processor, provenance),
        validation,
    )


def refuse_other_sizes(settings: PretrainSettings) -> None:
    """A preset states every size.

    Raises:
        ValueError: another setting of the model's sizes is given beside it.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    sizes = ("vision", "projection_dim", "image_size", "text_layers", "vision_projection_hidden")
    for name in (*sizes, "text_projection_hidden"):
        if getattr(settings, name) != defaults[name]:
            raise ValueError(f"--preset {settings.preset} states every size; leave --{name} out, or --preset")


def select(
    pairs: Sequence[Pair], modalities: list[str], labels: list[str], part: str | None, sources: Sequence[str] = ()
) -> Sequence[Pair]:
    """Pairs of some modalities, labels and collections, and of one share of the groups.

    Raises:
        ValueError: a modality, label or collection that no pair has, a part that is not like 1/3, or fewer than two
            pairs left.
    """
    share, count = _share(part)
    wanted = {"modalities": modalities, "labels": labels, "sources": list(sources)}
    if not any(wanted.values()) and count == 1:
        return _at_least_two(pairs, pairs)
    known: dict[str, set[str]] = {name: set() for name in wanted}
    fits: list[bool] = []
    for ids, groups, *columns in in_columns(pairs, ("id", "group", "modality", "label", "source")):
        for name, column in zip(wanted, columns, strict=True):
            known[name].update(column)
        for id, group, *own in zip(ids, groups, *columns, strict=True):
            chosen = all(not v or value in v for value, v in zip(own, wanted.values(), strict=True))
            fits.append(chosen and _number(group or id) % count == share - 1)
    for name, values in wanted.items():
        for value in values:
            if value not in known[name]:
                raise ValueError(
                    f"--{name} {value}: no training pair has it{nearest(value, known[name])}; "
                    f"known: {', '.join(sorted(known[name] - {''}))}"
                )
    return _at_least_two(take_rows(pairs, np.flatnonzero(fits)), pairs)


def _at_least_two(kept: Sequence[Pair], pairs: Sequence[Pair]) -> Sequence[Pair]:
    if len(kept) < 2:
        raise ValueError(f"the selection leaves {len(kept)} of {len(pairs)} training pairs; at least 2 are needed")
    return kept


def _share(part: str | None) -> tuple[int, int]:
    share, _, count = (part or "1/1").partition("/")
    if not (share.isdecimal() and count.isdecimal() and 1 <= int(share) <= int(count)):
        raise ValueError(f"--part {part} must be a share such as 1/3")
    return int(share), int(count)


def _number(key: str) -> int:
    """The same for all pairs of a group, whatever else the folder holds."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


if __name__ == "__main__":
    run(PretrainSettings, main)
