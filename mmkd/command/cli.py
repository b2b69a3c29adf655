"""``mmkd NAME ...``: the recipes under one command, each the same module that ``accelerate launch -m`` runs.

A recipe runs in this process, unless several processes are requested (``mmkd distill --num_processes 8 ...``) or
accelerate is configured on this machine: then it starts through ``accelerate launch``. Without a GPU, several processes
start through ``torchrun``, because ``accelerate launch --cpu`` starts one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.resources
import os
import runpy
import sys
from pathlib import Path

from mmkd.command.launch import launch
from mmkd.command.settings import COMMAND_VARIABLE, fail, ignore_broken_pipe, nearest

RECIPES = {
    "curate": ("mmkd.train.curate", "curate image-text pairs from tars, Parquet, lists, folders, the Hub or packages"),
    "pairs": ("mmkd.train.pairs", "folders of pairs: ls, show, stats, verify, preview, export, views"),
    "pretrain": ("mmkd.train.pretrain", "stage 1: contrastive pretraining of a student or a teacher"),
    "extract": ("mmkd.train.extract", "extract the features of teachers for every pair"),
    "verify-teacher": ("mmkd.train.verify_teacher", "compare a teacher's features with those the authors published"),
    "features": ("mmkd.train.features", "feature stores: ls, verify, merge, export, import"),
    "screen": ("mmkd.train.screen", "filter pairs by teacher agreement"),
    "align": ("mmkd.train.align", "align the teachers' features into a shared embedding space"),
    "distill": ("mmkd.train.distill", "stage 2: distil the features of all teachers into the student"),
    "merge": ("mmkd.train.merge", "average two models, or choose among them and their averages on validation"),
    "finetune": ("mmkd.train.finetune", "fine-tune a model on captions or labels, with LoRA or in full"),
    "tile": ("mmkd.train.tile", "extract the tile features of whole-slide images"),
    "slide-heatmap": ("mmkd.hub.slide_heatmap", "map how similar the tiles of a whole slide are to a text"),
    "eval": ("mmkd.train.eval", "compare the student with its teachers, with 95 % confidence intervals"),
    "datasets": ("mmkd.train.catalog", "evaluation datasets: ls, show, check, add"),
    "report": ("mmkd.train.report", "write one self-contained HTML page from an evaluation"),
    "plan": ("mmkd.train.plan", "estimate memory, time and cost of each stage on GPUs"),
    "pipeline": ("mmkd.train.pipeline", "the full pipeline from one YAML file"),
    "quickstart": ("mmkd.train.pipeline", "the full pipeline on packaged real images"),
    "predict": ("mmkd.hub.predict", "predict labels that you name for images, with calibrated probabilities"),
    "embed": ("mmkd.hub.embed", "encode images or texts, and write their vectors"),
    "index": ("mmkd.hub.index", "index the images of a folder for search, or update the index"),
    "search": ("mmkd.hub.search", "search an index by a sentence or an image"),
    "calibrate": ("mmkd.hub.calibrate", "calibrate predictions on labelled images: temperature, thresholds, sets"),
    "explain": ("mmkd.hub.explain", "heat map: which parts of an image its similarity with a text depends on"),
    "serve": ("mmkd.hub.serve", "serve a model over HTTP: embeddings in OpenAI's form, labels, search, and a page"),
    "push": ("mmkd.hub.push", "upload a model, adapter, features or pairs to the Hub, with a card"),
    "export": ("mmkd.hub.export", "export both towers for deployment: ONNX, torch.export or int8"),
    "miniature": (
        "mmkd.train.miniature",
        "compare the default recipe with controls without a teacher, on labelled folders",
    ),
    "doctor": ("mmkd.hub.doctor", "diagnose the installation"),
    "convert": ("mmkd.hub.convert", "convert the authors' checkpoint to a from_pretrained folder, and back"),
}
PIPELINES = {"quickstart": "quickstart.yaml"}
DISTRIBUTED = ("pretrain", "align", "distill", "finetune")
EXTRAS = {  # name of an imported package -> the extra that brings it
    package: extra
    for extra, packages in {
        "train": "accelerate psutil peft torchvision",
        "teachers": "open_clip timm",
        "eval": "sklearn threadpoolctl scipy",
        "search": "usearch",
        "slurm": "submitit",
        "ray": "ray",
        "export": "onnx onnxscript onnxruntime",
        "curate": "pyarrow msgspec imagehash datasketch py3langid pylatexenc datasets",
        "slides": "h5py openslide skimage",
        "serve": "fastapi uvicorn prometheus_client gradio python_multipart orjson",
    }.items()
    for package in packages.split()
}
LAUNCHER_OPTIONS = (
    *("num_processes", "num_machines", "machine_rank", "gpu_ids", "config_file"),
    *("main_process_ip", "main_process_port"),
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console command.

    Raises:
        SystemExit: with the recipe's exit code; 2 for an unknown command.
    """
    with ignore_broken_pipe():
        _main(sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    if argv and argv[0] == "--version":
        print(f"mmkd-clip {importlib.metadata.version('mmkd-clip')}")
        return
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: mmkd COMMAND [--config FILE.yaml] [--key value ...]; `mmkd COMMAND --help` lists the settings\n")
        print("\n".join(f"  {name:<15}{description}" for name, (_, description) in RECIPES.items()))
        return
    name, arguments = argv[0], argv[1:]
    if name not in RECIPES:
        fail(2, f"unknown command {name!r}{nearest(name, RECIPES)}; allowed: {', '.join(RECIPES)}", "mmkd")
    launcher, arguments = split_launcher_options(arguments)
    if launcher and name not in DISTRIBUTED:
        allowed = ", ".join(DISTRIBUTED)
        fail(2, f"--{next(iter(launcher))} is an option of {allowed}; {name} may have --workers", f"mmkd {name}")
    if name in PIPELINES:
        preset = importlib.resources.files("mmkd.train.configs") / PIPELINES[name]
        arguments = ["--config", str(preset), *arguments]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow a shared machine severalfold
    module = RECIPES[name][0]
    if name in DISTRIBUTED and not _is_launched() and (launcher or _accelerate_is_configured()):
        _run(name, [*arguments, "--check"])  # once, before several processes start
        command, environment = launch_command(module, launcher, arguments)
        raise SystemExit(launch(command, environment, module))
    _run(name, arguments)


def _run(name: str, arguments: list[str]) -> None:
    """Run a recipe in this process.

    Raises:
        SystemExit: with the recipe's exit code, or 1 where a package of an extra is missing.
    """
    sys.argv = [f"mmkd {name}", *arguments]
    os.environ[COMMAND_VARIABLE] = name
    try:
        runpy.run_module(RECIPES[name][0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code or "--check" not in arguments:
            raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        fail(1, f'{package} is not installed; run `pip install -e ".[{EXTRAS[package]}]"` in your clone')
    finally:
        os.environ.pop(COMMAND_VARIABLE, None)


def split_launcher_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options of ``accelerate launch`` by name, and the recipe's own arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in LAUNCHER_OPTIONS:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    launcher, own = parser.parse_known_args(arguments)
    return vars(launcher), own


def launch_command(module: str, launcher: dict[str, str], arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command that starts ``module`` on several processes of this interpreter, and the environment it needs."""
    import torch

    from mmkd.distributed import TORCHRUN

    if torch.cuda.is_available() or "config_file" in launcher or not launcher:
        options = [f"--{name}={value}" for name, value in launcher.items()]
        return [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", module, *arguments], {}
    names = {"num_processes": "nproc_per_node", "num_machines": "nnodes", "machine_rank": "node_rank"}
    names |= {"main_process_ip": "master_addr", "main_process_port": "master_port"}
    options = [f"--{names.get(name, name)}={value}" for name, value in launcher.items()]
    alone = [] if "num_machines" in launcher else ["--standalone"]  # a free port of its own
    command = [sys.executable, "-m", TORCHRUN, *alone, *options, "-m", module, *arguments]
    return command, {"ACCELERATE_USE_CPU": "1"}


def _is_launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _accelerate_is_configured() -> bool:
    home = os.environ.get("HF_HOME", Path("~/.cache/huggingface").expanduser())
    return any((Path(home) / "accelerate" / f"default_config.{ending}").is_file() for ending in ("yaml", "json"))


if __name__ == "__main__":
    main()
