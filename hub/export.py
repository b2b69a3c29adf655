"""Export both towers for deployment: ONNX, a torch.export program, or ONNX with weights in 8 bits.

The folder holds the processor and ``usage.py``, which works without this package. The export is compared with the model
in the same run (size, speed, cosine similarity), which is printed and written to ``comparison.json``; ``--pairs`` adds
zero-shot accuracy with paired intervals. A ``.pt2`` file (``exported-program``) can run code when it is loaded: load
only those that you trust.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.evaluation.statistics.bootstrap import REPLICATES, SEED, as_text


@dataclass
class ExportSettings:
    """Export both towers of a model.

    Example:
        mmkd export mmkd-clip --format onnx --output mmkd-clip-onnx
    """

    model: str = setting(help="folder or Hub id of a model", positional=True)
    format: Literal["onnx", "exported-program", "int8"] = setting(help="format of the towers")
    output: Path = setting(help="folder to write")
    pairs: Path | None = setting(None, "folder of pairs, to compare zero-shot accuracy on")
    split: Literal["train", "validation", "test"] = setting("test", "split of the pairs")
    repeats: int = setting(20, "maximum number of timed runs of each side, alternated; 0 skips the comparison", least=0)
    replicates: int = setting(REPLICATES, "bootstrap replicates", least=100)
    seed: int = setting(SEED, "seed of the bootstrap")
    quiet: bool = setting(False, "print nothing")
    overwrite: bool = setting(False, "replace OUTPUT")


if __name__ == "__main__":
    check_arguments(ExportSettings)  # before the imports that take seconds

import torch

from mmkd.data.folder import open_pairs
from mmkd.encoders.zoo import load_encoder
from mmkd.exporting.folder import quantized_export, require_exportable, write_export
from mmkd.files import atomic_folder, refuse_existing, write_json
from mmkd.serving.calibration import CALIBRATION_FILE
from mmkd.student.folder import PROVENANCE_FILE, load_student
from modeling_mmkd import MMKDClipModel

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "int8": ("onnx", "onnxscript", "onnxruntime")}


def main(settings: ExportSettings) -> None:
    """Export, compare, and write the folder whole.

    Raises:
        FileExistsError: OUTPUT exists.
        FileNotFoundError: model or pairs do not exist.
        ModuleNotFoundError: a package of the extra ``export`` is not installed.
        ValueError: the model cannot be exported, or its export differs from it.
    """
    check(settings)
    model, processor = load_student(settings.model)
    model.eval()
    source = Path(settings.model)
    require_exportable(processor, source)
    provenance = load_encoder(settings.model).provenance
    with (
        tempfile.TemporaryDirectory(prefix="mmkd-export-") as temporary,
        atomic_folder(settings.output, settings.overwrite) as folder,
    ):
        exports = {}
        if settings.format == "int8":
            exports["onnx"] = Path(temporary)
            write_export(exports["onnx"], model, processor, "onnx", provenance)
            quantized_export(exports["onnx"], folder)
        else:
            write_export(folder, model, processor, settings.format, provenance)
        exports[settings.format] = folder
        for name in (PROVENANCE_FILE, CALIBRATION_FILE):
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)
        comparison = compare(settings, model, processor, exports)
        if comparison:
            write_json(folder / "comparison.json", comparison)
    if not settings.quiet:
        show(settings, comparison)


def check(settings: ExportSettings) -> None:
    """Raise on invalid settings before anything is loaded."""
    refuse_existing(settings.output, settings.overwrite)
    if settings.pairs is not None:
        open_pairs(settings.pairs, settings.split)
    for package in NEEDED.get(settings.format, ()):
        importlib.import_module(package)


def compare(settings: ExportSettings, model: MMKDClipModel, processor: Any, exports: dict[str, Path]) -> dict[str, Any]:
    """Times, sizes, cosine similarity and, where there are pairs, accuracy."""
    from mmkd.exporting.comparison import lowest_cosines, measure, zero_shot  # here, because it loads the evaluation

    comparison: dict[str, Any] = {}
    side = int(processor.image_processor.crop_size["height"])
    if settings.repeats:
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        comparison = {
            "threads": torch.get_num_threads(),
            "repeats": settings.repeats,
            "rows": measure(model, size, exports, side, settings.repeats),
            "lowest_cosine": lowest_cosines(exports[settings.format], model, side),
        }
    if settings.pairs is not None:
        comparison["zero_shot"] = zero_shot(
            Path(settings.model),
            exports,
            settings.pairs,
            settings.split,
            settings.replicates,
            settings.seed,
            settings.quiet,
        )
    return comparison


def show(settings: ExportSettings, comparison: dict[str, Any]) -> None:
    """Print the comparison."""
    print(f"{settings.output}: both towers as {settings.format}; usage.py shows how to use them")
    if settings.format == "exported-program":
        print("a .pt2 file can run code when it is loaded: load only those that you trust")
    if "rows" in comparison:
        print(f"\nmilliseconds an item, median of at most {comparison['repeats']} alternated runs, threads: ", end="")
        print(comparison["threads"])
        print(f"{'':<18}{'MB':>8}" + "".join(f"{f'{t}, batch {b}':>18}" for t in ("image", "text") for b in (1, 16)))
        for name, row in comparison["rows"].items():
            times = [row[f"{tower}_ms"][batch] for tower in ("image", "text") for batch in ("1", "16")]
            print(f"{name:<18}{row['megabytes']:>8.1f}" + "".join(f"{value:>18.2f}" for value in times))
        lowest = ", ".join(f"{tower} {value:.4f}" for tower, value in comparison["lowest_cosine"].items())
        print(f"lowest cosine similarity to the model on random inputs: {lowest}")
    for name, task in comparison.get("zero_shot", {}).items():
        units = task["units"]["image"]
        print(f"\n{name}: {units['n']} images in {units['groups']} groups")
        for row, cell in task["rows"].items():
            print(f"  {row:<18}{_texts(cell['metrics'], 'value')}")
        for other, metrics in task["differences"].items():
            print(f"  {settings.format} - {other}: {_texts(metrics, 'difference', '+')}")


def _texts(metrics: dict[str, Any], key: str, sign: str = "") -> str:
    chosen = [name for name in ("accuracy", "balanced_accuracy") if name in metrics]
    return "  ".join(f"{name} {as_text(metrics[name], key, 4, sign)}" for name in chosen)


if __name__ == "__main__":
    run(ExportSettings, main)
