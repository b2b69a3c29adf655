"""Whether a device computes what a CPU does, and how fast: one object of JSON as the last line, exit code 1 if not.

    bash tests/device/run.sh [--cpu] [--output FILE]

Everything is made here: a tiny student, pictures and teacher features. Gradients of both trainings, features of an
extraction and scores of an evaluation are compared with those of the CPU in fp32, whole and in micro-batches, compiled
and not. Then operators that make the processor wait in one step, a process group of one, and on a GPU alone the speed,
memory and share of the peak of ViT-B/16 and BERT-base at 1,024 pairs. `--cpu` runs the same code without a GPU.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from tiny_model import save_tiny
from torch import Tensor
from transformers import BertConfig, CLIPVisionConfig
from waits import Waits

import mmkd.train.eval
from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair
from mmkd.distillation.objective import DistillObjective
from mmkd.distillation.options import DISTILL_LOSSES, DistillOptions
from mmkd.distributed import allow_tf32
from mmkd.encoders.zoo import load_encoder
from mmkd.student.flops import peak_flops, step_cost
from mmkd.student.folder import load_student
from mmkd.student.trainable import set_training_mode
from mmkd.training.batches import pair_batches
from mmkd.training.contrastive import ContrastiveObjective
from mmkd.training.gradient_cache import cached_backward
from mmkd.training.objectives import Objective, ObjectiveWrapper
from mmkd.training.optimizer import build_optimizer, make_trainable
from mmkd.training.settings import BatchSettings, LoopSettings, ModelSettings
from modeling_mmkd import MMKDClipConfig, MMKDClipModel

PAIRS, BATCH, MICRO = 48, 16, 6
# Relative error of a gradient, 1 - cosine of features, difference of a score.
LIMITS = {
    "gradient": {"fp32": 1e-4, "tf32": 2e-2, "bf16": 0.15},
    "features": {"fp32": 1e-5, "bf16": 1e-2},
    "score": 0.05,
}
LARGE, LARGE_MICRO, TOKENS, WARM_STEPS, STEPS = 1024, 128, 64, 2, 5


def main() -> int:
    """Run every check, print a line for each, and the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if not given.cpu and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --cpu runs the same checks without one")
    device = "cpu" if given.cpu else "cuda"
    report: dict[str, Any] = {
        "device": "cpu" if given.cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        for name, check in {
            "gradients": partial(gradients, world, device),
            "extract": partial(extract, world, device),
            "eval": partial(evaluate, world, device),
            "waits": partial(waits, world, device),
            "group_of_one": partial(group, world, device),
            "speed": partial(speed, device),
        }.items():
            began = time.perf_counter()
            found, wrong = check()
            report[name] = found | {"seconds": round(time.perf_counter() - began, 1)}
            failed += [f"{name}: {what}" for what in wrong]
            print(name, json.dumps(report[name]), flush=True)
    line = json.dumps(report | {"failed": failed})
    if given.output is not None:
        given.output.write_text(line + "\n")
    print(line)
    return 1 if failed else 0


def make_world(folder: Path) -> Path:
    """Pairs of drawn pictures of two modalities, features of two teachers, and a student."""
    rng = np.random.default_rng(0)
    (folder / "pairs" / "images").mkdir(parents=True)
    pairs = []
    for k in range(PAIRS):
        kind = k % 2
        pixels = rng.integers(120 * kind, 120 + 120 * kind, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pairs" / "images" / f"{k}.png")
        split, modality = ("train", "test")[k >= PAIRS * 2 // 3], ("ct", "mri")[kind]
        text = f"{modality} of case {k}" + " and its follow-up" * (k % 3)
        pairs.append(Pair(f"p{k}", f"{k}.png", text, modality, label=f"l{k % 4}", group=f"g{k}", split=split))
    write_manifest(folder / "pairs", pairs)
    for name in ("one", "two"):
        writer = FeatureWriter(folder / "features" / name, name)
        of_images, of_texts = torch.from_numpy(rng.normal(size=(2, PAIRS, 16))).float()
        writer.add([pair.id for pair in pairs], of_images, of_texts)
        writer.finish({})
    save_tiny(folder / "student")
    return folder


def objective_of(world: Path, stage: str, compiled: bool = False) -> tuple[Objective, Any]:
    """A fresh objective and the student's processor."""
    model, processor = load_student(str(world / "student"))
    make_trainable(model, ModelSettings(compile=compiled))
    losses = {name: 1.0 for name in DISTILL_LOSSES if name != "heads"}
    options = DistillOptions(losses=losses, confidence=0.5, false_negatives=0.9, teacher_dropout=0.2)
    objective = ContrastiveObjective(model) if stage == "pretrain" else DistillObjective(model, options)
    set_training_mode(objective, dropout=0.0)
    return objective, processor


def batch_of(world: Path, processor: Any) -> dict[str, Any]:
    """The first batch of both trainings; the teachers are as wide as the student."""
    features = TeacherFeatures.open(world / "features")
    settings = BatchSettings(batch_size=BATCH, workers=0, crop="center")
    batches = pair_batches(
        open_pairs(world / "pairs", "train"), processor, settings, dict.fromkeys(("teachers", "aligned"), features)
    )
    return {**next(iter(batches.epoch(0))), "epoch": 0}


def backward(objective: Objective, batch: dict[str, Any], device: str, precision: str, micro: int | None) -> Tensor:
    """The gradient of one step, all parameters in one vector on the CPU."""
    objective.to(device)
    objective.zero_grad()
    wrapper = ObjectiveWrapper(objective, device, "bf16" if precision == "bf16" else "fp32")
    allow_tf32(precision == "tf32")
    step(wrapper, batch, device, micro)
    return torch.cat([p.grad.detach().flatten().cpu() for p in objective.parameters() if p.grad is not None])


def step(wrapper: Any, batch: dict[str, Any], device: str, micro: int | None) -> None:
    """Forward and backward pass, as the loop does them."""
    to_device = partial(send_to_device, device=device, non_blocking=True)
    if micro is None:
        wrapper(ObjectiveWrapper.loss_of_batch, to_device(batch))["loss"].backward()
        return
    options: dict[str, Any] = {"to_device": to_device, "without_sync": nullcontext, "seed": (0,)}
    cached_backward(wrapper, batch, micro, backward=lambda loss: loss.backward(), **options)


def gradients(world: Path, device: str) -> tuple[dict[str, Any], list[str]]:
    """Relative error of the gradient of each stage in each form, from that of the CPU in fp32."""
    found: dict[str, float] = {}
    for stage in ("pretrain", "distill"):
        objective, processor = objective_of(world, stage)
        batch = batch_of(world, processor)
        expected = backward(objective, batch, "cpu", "fp32", None)
        forms = [(p, m, False) for p in LIMITS["gradient"] for m in (None, MICRO) if device == "cuda" or p != "tf32"]
        forms += [(p, None, True) for p in ("fp32", "bf16") if device == "cuda"]  # a CPU compiles for minutes
        for precision, micro, compiled in forms:
            own = objective_of(world, stage, compiled)[0]
            name = f"{stage} {precision}{' micro-batches' if micro else ''}{' compiled' if compiled else ''}"
            difference = backward(own, batch, device, precision, micro) - expected
            found[name] = float(difference.norm() / expected.norm())
    wrong = [f"{name} {error:.2g}" for name, error in found.items() if not error < LIMITS["gradient"][name.split()[1]]]
    return found, wrong


def extract(world: Path, device: str) -> tuple[dict[str, Any], list[str]]:
    """1 - cosine of features of images and texts, the largest, from those of the CPU in fp32."""
    folder = open_pairs(world / "pairs")
    images = [Image.open(folder.image_path(pair)).convert("RGB") for pair in folder.pairs]
    texts = [pair.caption for pair in folder.pairs]
    allow_tf32(False)
    encoder = load_encoder(str(world / "student"), "cpu")
    expected = torch.cat([encoder.encode_images(images), encoder.encode_texts(texts)]).float().cpu()
    found: dict[str, float] = {}
    for precision in LIMITS["features"]:
        encoder = load_encoder(str(world / "student"), device)
        encoder.autocast = (device, torch.bfloat16) if precision == "bf16" else None
        own = torch.cat([encoder.encode_images(images), encoder.encode_texts(texts)]).float().cpu()
        found[precision] = float(1 - torch.nn.functional.cosine_similarity(own, expected).min())
    return found, [f"{name} {error:.2g}" for name, error in found.items() if not error < LIMITS["features"][name]]


def evaluate(world: Path, device: str) -> tuple[dict[str, Any], list[str]]:
    """Largest difference of any task's primary metric from that of the CPU in fp32."""

    def scores(name: str, place: str, precision: str) -> dict[str, float]:
        settings = mmkd.train.eval.EvalSettings(
            encoders=[f"student={world / 'student'}"], pairs=world / "pairs", output=world / name, device=place,
            precision=precision, kinds=["zeroshot", "retrieval"], replicates=100, quiet=True,
        )  # fmt: skip
        mmkd.train.eval.main(settings)
        tasks = json.loads((world / name / "summary.json").read_text())["tasks"]
        return {t: of["rows"]["student"]["metrics"][of["primary_metric"]]["value"] for t, of in tasks.items()}

    expected = scores("eval-cpu", "cpu", "float32")
    found = {"tasks": len(expected)}
    for precision in ("float32", "bfloat16"):
        own = scores(f"eval-{precision}", device, precision)
        found[precision] = max(abs(own[task] - value) for task, value in expected.items())
    # A student of random weights is near ties, which bf16 turns: its difference is shown and not judged.
    return found, [] if found["float32"] < LIMITS["score"] and expected else [f"float32 {found['float32']:.2g}"]


def waits(world: Path, device: str) -> tuple[dict[str, Any], list[str]]:
    """Operators that make the processor wait for the device: in the loss of stage 2, and in all of a step."""
    objective, processor = objective_of(world, "distill")
    batch = send_to_device(batch_of(world, processor), device)
    wrapper = ObjectiveWrapper(objective.to(device), device, "fp32")
    optimizer = build_optimizer(objective, LoopSettings(output=world))
    step(wrapper, batch, device, None)  # what is made once
    with torch.no_grad():
        embeddings = objective.encode(batch)
    leaves = {name: rows.requires_grad_() for name, rows in embeddings.items()}
    with counted(device) as in_loss:
        objective.loss(leaves, batch)["loss"].backward()
    with counted(device) as in_step:
        step(wrapper, batch, device, None)
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
    found = {"loss": len(in_loss), "step": len(in_step), "step_at": sorted(set(in_step))}
    return found, [f"the loss waits {len(in_loss)} times"] if in_loss else []


@contextmanager
def counted(device: str) -> Iterator[list[str]]:
    """Within it the list gets an entry for each wait: as CUDA reports them, or by the operators on a CPU."""
    if device == "cpu":
        with Waits() as mode:
            yield mode.found
        return
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def group(world: Path, device: str) -> tuple[dict[str, Any], list[str]]:
    """The gradient in a process group of one, over NCCL or gloo and through DDP, against that without a group."""
    objective, processor = objective_of(world, "distill")
    batch = batch_of(world, processor)
    expected = backward(objective, batch, device, "fp32", None)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=0, world_size=1, store=torch.distributed.HashStore())
    own = objective_of(world, "distill")[0].to(device)
    wrapper = torch.nn.parallel.DistributedDataParallel(ObjectiveWrapper(own, device, "fp32"))
    step(wrapper, batch, device, None)
    found = torch.cat([p.grad.flatten().cpu() for p in own.parameters() if p.grad is not None])
    del wrapper
    torch.distributed.destroy_process_group()
    error = float((found - expected).norm() / expected.norm())
    return {"backend": backend, "gradient": error}, [] if error < LIMITS["gradient"]["fp32"] else [f"{error:.2g}"]


def speed(device: str) -> tuple[dict[str, Any], list[str]]:
    """Seconds, peak memory and share of the peak of steps of ViT-B/16 and BERT-base in bf16, by kind of attention."""
    if device == "cpu":
        return {"skipped": "needs a GPU"}, []
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(TOKENS // 4, TOKENS + 1, (LARGE,), generator=g).sort(descending=True).values
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    batch = {
        "pixel_values": torch.rand(LARGE, 3, 224, 224, generator=g),
        "input_ids": torch.randint(1000, 20000, (LARGE, TOKENS), generator=g) * mask,
        "attention_mask": mask,
        "text_lengths": lengths.tolist(),
        "ids": [str(k) for k in range(LARGE)],
    }
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for name, options in {
        "plain": ModelSettings(),
        "compiled": ModelSettings(compile=True),
        "flash": ModelSettings(attention="flash_attention_2"),
    }.items():
        try:
            model = MMKDClipModel(
                MMKDClipConfig(vision_config=CLIPVisionConfig(patch_size=16), text_config=BertConfig())
            )
            make_trainable(model, options)
        except ValueError as error:  # flash attention is not installed
            found[name] = {"skipped": str(error)}
            continue
        found[name] = timed(model, batch)
        wrong += [] if found[name]["finite"] else [f"{name}: the gradient is not finite"]
    return found, wrong


def timed(model: MMKDClipModel, batch: dict[str, Any]) -> dict[str, Any]:
    """Steps of stage 1 on the GPU, in micro-batches."""
    cost, lengths = step_cost(model), batch["text_lengths"]
    objective = ContrastiveObjective(model).cuda()
    set_training_mode(objective, dropout=0.0)
    optimizer = build_optimizer(objective, LoopSettings(output=Path("none")))
    wrapper = ObjectiveWrapper(objective, "cuda", "bf16")
    allow_tf32(True)
    torch.cuda.reset_peak_memory_stats()
    norm = torch.zeros(())
    for number in range(WARM_STEPS + STEPS):
        if number == WARM_STEPS:
            torch.cuda.synchronize()
            began = time.perf_counter()
        step(wrapper, batch, "cuda", LARGE_MICRO)
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / STEPS
    peak = peak_flops(torch.cuda.get_device_name(), "bf16")
    return {
        "pairs_per_second": round(len(lengths) / seconds, 1),
        "step_seconds": round(seconds, 4),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "mfu": None if peak is None or cost is None else round(cost.of(lengths) / seconds / peak, 4),
        "finite": bool(norm.isfinite()),
    }


if __name__ == "__main__":
    sys.exit(main())
