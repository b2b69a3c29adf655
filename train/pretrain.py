"""Stage 1: contrastive pretraining on image-text pairs.

The same recipe trains a generalist student and, on some of the modalities or labels, a specialist teacher. Reads
``pairs/``, writes a folder for ``from_pretrained``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmkd.command.settings import check_arguments, run, setting
from mmkd.training.settings import LoopSettings, ModelSettings, TaskLossSettings, ValidationSettings


@dataclass(kw_only=True)
class PretrainSettings(LoopSettings, ModelSettings, ValidationSettings, TaskLossSettings):
    """Train a student, or a specialist teacher, contrastively on pairs.

    Example:
        mmkd pretrain --pairs pairs --output stage1 --epochs 10 --batch_size 256
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "model": (
            "model preset vision text projection_dim image_size text_layers vision_projection_hidden "
            "text_projection_hidden"
        ),
        "data": "modalities labels sources part",
        "losses": "gather_gradient",
    }

    pairs: Path = setting(help="folder of pairs; the training split is used")
    model: str | None = setting(None, "folder or Hub id of a student to start from, instead of vision and text")
    preset: str | None = setting(None, "a named size of docs/model.md, with random weights and the tokenizer of text")
    vision: str = setting("packaged:efficientnet-lite0", "starting weights of the vision tower")
    text: str = setting("packaged:all-minilm-l6-v2", "starting weights of the text tower")
    projection_dim: int = setting(512, "width of the shared embedding space")
    image_size: int | None = setting(None, "side of the images [pixels]; null takes the vision tower's")
    text_layers: int | None = setting(None, "keep only the first layers of the text tower; null keeps all")
    vision_projection_hidden: int | None = setting(None, "hidden width of the image projection; null is one layer")
    text_projection_hidden: int | None = setting(
        None, "hidden width of the text projection; null is the mean of its input and output widths"
    )
    modalities: list[str] = setting(factory=list, help="keep only pairs of these modalities")
    labels: list[str] = setting(factory=list, help="keep only pairs of these labels")
    sources: list[str] = setting(factory=list, help="keep only pairs of these collections")
    part: str | None = setting(None, "keep one share of the groups, such as 1/3")
    gather_gradient: bool = setting(
        True, "gradient through the features of other processes; false as released: another model on several processes"
    )


if __name__ == "__main__":
    check_arguments(PretrainSettings)  # before the imports that take seconds

from mmkd.command.settings import resolved
from mmkd.data.folder import PairFolder, hold_out_split, open_pairs, select
from mmkd.student.folder import save_student, training_provenance
from mmkd.student.towers import starting_student
from mmkd.training.batches import training_batches
from mmkd.training.contrastive import ContrastiveObjective
from mmkd.training.loop import fit, start
from mmkd.training.optimizer import make_trainable
from mmkd.training.validation import validation_of


def main(settings: PretrainSettings) -> None:
    """Train and write the folder."""
    accelerator = start(settings)
    folder, held_out = hold_out_split(open_pairs(settings.pairs, "train"), settings.hold_out)
    pairs = select(folder.pairs, settings.modalities, settings.labels, settings.part, settings.sources)
    if settings.model is None and settings.preset is not None:
        refuse_other_sizes(settings)
    model, processor = starting_student(resolved(settings))
    make_trainable(model, settings)
    chosen = PairFolder(folder.path, folder.image_root, pairs)
    batches = training_batches(chosen, model, processor, settings)
    validation = validation_of(settings, settings.pairs, processor, held_out)
    objective = ContrastiveObjective(model, settings, settings.gather_gradient)
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


if __name__ == "__main__":
    run(PretrainSettings, main)
