"""What a training would take: memory, time and money of each stage, from the measured model and stated assumptions.

Operations come from `mmkd.student.flops`, parameters are counted, and the activations that a backward pass keeps are
measured
by running the model on a few images and captions. What cannot be known here (the share of its peak that a GPU will
reach, how many images its cores decode, prices) is an assumption with a name, and every plan prints its assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkd.student.flops import StepCost, peak_flops, step_cost

# Memory of a GPU in 10^9 bytes, by words of its name as in `mmkd.student.flops.PEAKS`.
GPU_MEMORY = {
    **{"b200": 180, "gh200": 96, "h200": 141, "h100": 80, "h100-pcie": 80, "a100": 80, "a100-40": 40},
    **{"mi300x": 192, "mi250x": 128, "l40s": 48, "l4": 24, "a10": 24, "a6000": 48},
    **{"rtx-4090": 24, "rtx-3090": 24, "v100": 32, "t4": 16},
}
BYTES_OF_TRAINING = 16  # a parameter in fp32, its gradient and AdamW's two moments
BYTES_OF_CAST = 2  # its copy in bf16 while autocast needs it
RESERVED_GB = 3.0  # the CUDA context, communication buffers and what the allocator cannot use
CHECKPOINTED_SHARE = 0.07  # of a layer's activations, its input: width of about 14 widths kept
LOSS_MATRICES = 6  # local rows x global columns in fp32 that a step holds at once
MEASURED_ROWS, MEASURED_TOKENS = 2, 64


@dataclass(frozen=True)
class ModelSize:
    """What a model takes, measured.

    Attributes:
        parameters: of the whole model.
        learning: of those, how many learn.
        cost: operations of a step.
        image_bytes: activations of one image that the backward pass needs.
        token_bytes: the same of one token of a caption.
        image_layers: layers of the image tower, 1 where it cannot be checkpointed layer by layer.
        text_layers: the same of the text tower.
        dim: width of the common space.
    """

    parameters: int
    learning: int
    cost: StepCost
    image_bytes: float
    token_bytes: float
    image_layers: int
    text_layers: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan takes for granted.

    Attributes:
        efficiency: share of a GPU's peak that a step reaches.
        images_per_core: images a second that one core decodes and crops.
        cores_per_gpu: cores that read images for each GPU.
        mean_tokens: tokens of a caption on average.
        padding: processed tokens for each useful one.
        price: of a GPU for an hour.
    """

    efficiency: float = 0.35
    images_per_core: float = 700.0
    cores_per_gpu: int = 8
    mean_tokens: float = 60.0
    padding: float = 1.1
    price: float = 2.5


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage to plan: how many pairs pass, how often, and whether they train."""

    name: str
    pairs: int
    epochs: float = 1.0
    models: int = 1
    trains: bool = True
    batch_size: int = 4096
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False


@dataclass
class Estimate:
    """What a stage takes; ``warnings`` say what cannot work and what would, ``hints`` what would be faster."""

    stage: str
    steps: int
    hours: float
    gpu_hours: float
    price: float
    memory_gb: float
    limit: str
    warnings: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


def measure(model: nn.Module, image_size: int, precision: Literal["fp32", "bf16"]) -> ModelSize:
    """Measure a model on the CPU, on two images and two captions of 64 tokens.

    Args:
        model: an ``MMKDClipModel`` with weights of any kind.
        image_size: side of its images.
        precision: of the forward pass.

    Raises:
        ValueError: a tower whose cost is not known.
    """
    cost = step_cost(model)
    if cost is None:
        raise ValueError("the text tower does not say its layers and widths, so its cost cannot be planned")
    config: Any = model.config
    vocabulary = config.text_config.vocab_size
    pixels = torch.zeros(MEASURED_ROWS, 3, image_size, image_size)
    ids = torch.arange(MEASURED_ROWS * MEASURED_TOKENS).remainder(vocabulary).view(MEASURED_ROWS, MEASURED_TOKENS)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        image_bytes = _kept_bytes(model, lambda: model(pixel_values=pixels))
        text_bytes = _kept_bytes(model, lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)))
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        learning=sum(p.numel() for p in model.parameters() if p.requires_grad),
        cost=cost.at_side(image_size),
        image_bytes=image_bytes / MEASURED_ROWS,
        token_bytes=text_bytes / MEASURED_ROWS / MEASURED_TOKENS,
        image_layers=getattr(config.vision_config, "num_hidden_layers", 1),
        text_layers=getattr(config.text_config, "num_hidden_layers", 1),
        dim=config.projection_dim,
    )


def estimate(
    stage: Stage,
    size: ModelSize,
    gpu: str,
    gpus: int,
    *,
    precision: Literal["fp32", "bf16"] = "bf16",
    sharded: bool = False,
    assumed: Assumptions | None = None,
) -> Estimate:
    """Memory of a GPU, hours and price of a stage.

    Args:
        stage: what is done.
        size: from `measure`.
        gpu: a name from `GPU_MEMORY`.
        gpus: how many.
        precision: of the forward pass.
        sharded: weights, gradients and optimizer sharded over the GPUs (FSDP2).
        assumed: by default `Assumptions()`.

    Raises:
        ValueError: a GPU that is not known.
    """
    assumed = assumed or Assumptions()
    if gpu not in GPU_MEMORY:
        raise ValueError(f"--gpu {gpu} is not known; give one of {', '.join(GPU_MEMORY)}")
    peak = peak_flops(gpu.replace("-40", ""), precision)
    assert peak is not None
    rows = math.ceil(stage.batch_size / gpus)
    micro = min(rows, stage.micro_batch_size or rows)
    memory = _memory_gb(stage, size, gpus, rows, micro, precision, sharded, assumed)
    seconds_compute = _operations(stage, size, micro < rows, assumed) / (peak * assumed.efficiency)
    seconds_data = 1 / (assumed.images_per_core * assumed.cores_per_gpu)
    pairs = stage.pairs * stage.epochs / gpus * stage.models
    hours = pairs * max(seconds_compute, seconds_data) / 3600
    found = Estimate(
        stage=stage.name,
        steps=math.ceil(stage.pairs / stage.batch_size * stage.epochs),
        hours=hours,
        gpu_hours=hours * gpus,
        price=hours * gpus * assumed.price,
        memory_gb=memory,
        limit="decoding" if seconds_data > seconds_compute else "compute",
    )
    found.warnings += _warnings(stage, size, gpu, gpus, memory, precision, sharded, assumed)
    if seconds_data > seconds_compute:
        needed = math.ceil(assumed.cores_per_gpu * seconds_data / seconds_compute)
        found.hints.append(
            f"{stage.name}: the GPUs wait for images; give each {needed} cores, or prepare images at 256 pixels "
            "(`mmkd curate --short_side 256`)"
        )
    return found


def _operations(stage: Stage, size: ModelSize, is_cached: bool, assumed: Assumptions) -> float:
    """Operations of one pair, padding and what is computed twice included."""
    tokens, cost = assumed.mean_tokens, size.cost
    text = (cost.token * tokens + cost.token_pair * tokens**2) * assumed.padding
    if not stage.trains:
        return cost.image + text
    again = int(is_cached) + int(stage.gradient_checkpointing)
    return (cost.image_passes + again) * cost.image + (cost.text_passes + again) * text


def _memory_gb(
    stage: Stage,
    size: ModelSize,
    gpus: int,
    rows: int,
    micro: int,
    precision: str,
    sharded: bool,
    assumed: Assumptions,
) -> float:
    """The most memory of a GPU in a step, in 10^9 bytes."""
    cast = BYTES_OF_CAST if precision == "bf16" else 0
    if not stage.trains:
        layer = size.image_bytes / size.image_layers + size.token_bytes * assumed.mean_tokens / size.text_layers
        return (size.parameters * (4 + cast) + micro * layer) / 1e9 + RESERVED_GB
    frozen = size.parameters - size.learning
    weights = (size.learning * BYTES_OF_TRAINING + frozen * 4) / (gpus if sharded else 1)
    image, token = size.image_bytes, size.token_bytes
    if stage.gradient_checkpointing:  # the input of every layer, and all of one layer
        image *= CHECKPOINTED_SHARE + 1 / size.image_layers
        token *= CHECKPOINTED_SHARE + 1 / size.text_layers
    activations = micro * (image + token * assumed.mean_tokens * assumed.padding)
    columns = rows * gpus
    loss = LOSS_MATRICES * rows * columns * 4 + 8 * columns * size.dim * 4
    return (weights + size.parameters * cast + activations + loss) / 1e9 + RESERVED_GB


def _warnings(
    stage: Stage,
    size: ModelSize,
    gpu: str,
    gpus: int,
    memory: float,
    precision: str,
    sharded: bool,
    assumed: Assumptions,
) -> list[str]:
    """What cannot work, and what would."""
    found, rows, room = [], math.ceil(stage.batch_size / gpus), GPU_MEMORY[gpu]
    if stage.batch_size % gpus:
        found.append(f"{stage.name}: a batch of {stage.batch_size} cannot be shared out evenly among {gpus} GPUs")
    if precision == "bf16" and gpu in ("v100", "t4"):
        found.append(f"{stage.name}: {gpu} has no bf16; take --precision fp32")
    if memory <= room:
        return found
    told = f"{stage.name}: {memory:.0f} GB a GPU do not fit into the {room} GB of a {gpu}"
    micro = rows
    while micro > 1:
        micro = micro // 2
        if _memory_gb(stage, size, gpus, rows, micro, precision, sharded, assumed) <= room:
            return [*found, f"{told}; --micro_batch_size {micro} fits (the same gradient, one more forward pass)"]
    spread = "" if sharded else "--sharded true (see train/configs/), "
    return [*found, f"{told}, whatever the micro-batch; take {spread}more GPUs, or a smaller batch"]


def _kept_bytes(model: nn.Module, forward: Callable[[], object]) -> float:
    """Bytes of what a forward pass keeps for the backward pass, parameters aside, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    del output
    return float(sum(kept.values()))
