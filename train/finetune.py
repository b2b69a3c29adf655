"""Fine-tune any ``from_pretrained`` folder on pairs: by captions or by labels, with a small adapter or in full.

Reads ``pairs/`` and a model folder. Writes a model folder with the adapter merged, which every other command and
pipeline reads, and beside it ``adapter/``, a few megabytes for users of the base model; ``--merge false`` writes only
the adapter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.training.settings import BatchSettings, LoopSettings, ModelSettings, TaskLossSettings


@dataclass(kw_only=True)
class FinetuneSettings(LoopSettings, ModelSettings, BatchSettings, TaskLossSettings):
    """Fine-tune a model folder on pairs.

    Example:
        mmkd finetune --pairs pairs --model mmkd-clip --output finetuned --objective classification
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "losses": "objective",
        "model": "method rank targets train_logit_scale merge",
    }

    pairs: Path = setting(help="folder of pairs; the training split is used")
    model: str = setting(help="folder or Hub id of the model to start from")
    objective: Literal["contrastive", "classification"] = setting(
        "contrastive", "train on captions, or on labels described by the prompts of the evaluation"
    )
    method: Literal["lora", "dora", "full"] = setting("lora", "a low-rank adapter, or all weights")
    rank: int = setting(8, "rank of the adapter")
    targets: Literal["attention", "all"] = setting(
        "attention", "layers that get an adapter: queries, values and projections, or every linear layer"
    )
    train_logit_scale: bool = setting(False, "train logit_scale beside an adapter; needs --merge true")
    merge: bool = setting(True, "write the whole model with the adapter merged, and the adapter beside it")


if __name__ == "__main__":
    check_arguments(FinetuneSettings)  # before the imports that take seconds

from mmkd.data.folder import PairFolder, open_pairs
from mmkd.encoders.weights import quiet_transformers
from mmkd.student.folder import load_student, save_student, training_provenance, write_provenance
from mmkd.student.trainable import add_adapter
from mmkd.training.batches import training_batches
from mmkd.training.contrastive import ContrastiveObjective, PromptClassification
from mmkd.training.loop import fit, start
from mmkd.training.objectives import Objective
from mmkd.training.optimizer import make_trainable


def main(settings: FinetuneSettings) -> None:
    """Train and write the folder.

    Raises:
        ValueError: settings that contradict each other, or pairs without labels for the objective classification.
    """
    accelerator = start(settings)
    check(settings)
    folder = open_pairs(settings.pairs, "train")
    pairs = list(folder.pairs)
    if settings.objective == "classification":
        pairs = [pair for pair in pairs if pair.label]
    chosen = PairFolder(folder.path, folder.image_root, pairs)
    model, processor = load_student(settings.model)
    adapted = None
    if settings.method != "full":
        adapted = add_adapter(model, settings.method, settings.rank, settings.targets)
        model.get_parameter("logit_scale").requires_grad_(settings.train_logit_scale)
    make_trainable(model, settings)
    objective: Objective = ContrastiveObjective(model, settings)
    if settings.objective == "classification":
        objective = PromptClassification(model, processor, pairs)
    batches = training_batches(chosen, model, processor, settings)
    provenance = training_provenance("finetune", chosen, [settings.model])

    def write(path: Path) -> None:
        if adapted is not None:
            save_adapter(path / "adapter" if settings.merge else path, adapted, processor, provenance)
        if settings.merge:
            save_student(path, model if adapted is None else adapted.merge_and_unload(), processor, provenance)

    fit(accelerator, objective, batches, settings, write)


def check(settings: FinetuneSettings) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ValueError: the message names them.
    """
    if not settings.merge and settings.method == "full":
        raise ValueError("--merge false writes an adapter alone, and --method full has none; choose lora or dora")
    if not settings.merge and settings.train_logit_scale:
        raise ValueError("an adapter cannot hold logit_scale: --train_logit_scale true needs --merge true")
    if settings.objective == "classification":
        for name, value in asdict(TaskLossSettings()).items():
            if getattr(settings, name) != value:
                raise ValueError(f"--{name} belongs to --objective contrastive; leave it out with classification")


def save_adapter(folder: Path, adapted: Any, processor: Any, provenance: dict[str, Any]) -> None:
    """Write a folder for ``PeftModel.from_pretrained``, with the processor and the provenance of the adapter."""
    with quiet_transformers():
        adapted.save_pretrained(folder)
        processor.save_pretrained(folder)
    write_provenance(folder, provenance)


if __name__ == "__main__":
    run(FinetuneSettings, main)
