"""Estimate what a training takes: memory, time and cost of each stage, from the measured model and assumptions.

`mmkd.student.flops` counts the operations, and the activations that a backward pass keeps are measured by running the
model on a few images and captions. What cannot be measured here (the share of its peak that a GPU reaches, the images
that a core decodes per second, prices) is a named assumption, and every plan prints its assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkd.student.flops import GPUS, StepCost, peak_flops, step_cost

BYTES_OF_TRAINING = 16  # of a parameter: fp32 value, gradient and AdamW's two moments
BYTES_OF_CAST = 2  # of a parameter's bf16 copy under autocast
RESERVED_GB = 3.0  # CUDA context, communication buffers and fragmentation
CHECKPOINTED_SHARE = 0.07  # of a layer's activations: its input, one of about 14 tensors of its width
LOSS_MATRICES = 6  # fp32 matrices of local rows x global columns that a step holds at once
MEASURED_ROWS, MEASURED_TOKENS = 2, 64


@dataclass(frozen=True)
class ModelSize:
    """Measured size of a model.

    Attributes:
        parameters: number of all parameters.
        trainable: number of trainable parameters.
        cost: operations of a step.
        image_bytes: activations of one image that the backward pass needs.
        token_bytes: the same of one token of a caption.
        image_layers: layers of the image tower, 1 where it cannot be checkpointed layer by layer.
        text_layers: the same of the text tower.
        dim: width of the shared embedding space.
    """

    parameters: int
    trainable: int
    cost: StepCost
    image_bytes: float
    token_bytes: float
    image_layers: int
    text_layers: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The GPUs and what is assumed about them.

    Attributes:
        gpu: name from `mmkd.student.flops.GPUS`.
        gpus: number of GPUs.
        precision: of the forward pass.
        sharded: weights, gradients and optimizer state are sharded over the GPUs (FSDP2).
        efficiency: share of a GPU's peak that a step reaches.
        images_per_core: images that one core decodes and crops per second.
        cores_per_gpu: cores that read images for each GPU.
        mean_tokens: mean length of a caption.
        padding: processed tokens per useful token.
        price: of a GPU for an hour.
    """

    gpu: str
    gpus: int
    precision: Literal["fp32", "bf16"] = "bf16"
    sharded: bool = False
    efficiency: float = 0.35
    images_per_core: float = 700.0
    cores_per_gpu: int = 8
    mean_tokens: float = 60.0
    padding: float = 1.1
    price: float = 2.5

    def __post_init__(self) -> None:
        """Refuse an unknown GPU.

        Raises:
            ValueError: the message lists the known ones.
        """
        if self.gpu not in GPUS:
            raise ValueError(f"--gpu {self.gpu} is not known; give one of {', '.join(GPUS)}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage to plan: number of pairs, passes over them, and whether models are trained."""

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
    """Requirements of a stage; ``warnings`` are about what cannot work, ``hints`` about what would be faster."""

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
        model: an ``MMKDClipModel`` with any weights.
        image_size: side of its images.
        precision: of the forward pass.

    Raises:
        ValueError: a tower whose operations cannot be counted.
    """
    cost = step_cost(model)
    if cost is None:
        raise ValueError("the operations of this model cannot be counted: it needs a vision and a text configuration")
    config: Any = model.config
    vocabulary = config.text_config.vocab_size
    pixels = torch.zeros(MEASURED_ROWS, 3, image_size, image_size)
    ids = torch.arange(MEASURED_ROWS * MEASURED_TOKENS).remainder(vocabulary).view(MEASURED_ROWS, MEASURED_TOKENS)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        image_bytes = _activation_bytes(model, lambda: model(pixel_values=pixels))
        text_bytes = _activation_bytes(model, lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)))
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        cost=cost.at_side(image_size),
        image_bytes=image_bytes / MEASURED_ROWS,
        token_bytes=text_bytes / MEASURED_ROWS / MEASURED_TOKENS,
        image_layers=getattr(config.vision_config, "num_hidden_layers", 1),
        text_layers=getattr(config.text_config, "num_hidden_layers", 1),
        dim=config.projection_dim,
    )


def estimate(stage: Stage, size: ModelSize, hardware: Hardware) -> Estimate:
    """Memory of a GPU, hours and price of a stage."""
    peak = peak_flops(hardware.gpu, hardware.precision)
    assert peak is not None
    seconds_compute = _operations(stage, size, hardware) / (peak * hardware.efficiency)
    seconds_data = 1 / (hardware.images_per_core * hardware.cores_per_gpu)
    hours = stage.pairs * stage.epochs / hardware.gpus * stage.models * max(seconds_compute, seconds_data) / 3600
    found = Estimate(
        stage=stage.name,
        steps=math.ceil(stage.pairs / stage.batch_size * stage.epochs),
        hours=hours,
        gpu_hours=hours * hardware.gpus,
        price=hours * hardware.gpus * hardware.price,
        memory_gb=_memory_gb(stage, size, hardware),
        limit="decoding" if seconds_data > seconds_compute else "compute",
        warnings=_warnings(stage, size, hardware),
    )
    if seconds_data > seconds_compute:
        needed = math.ceil(hardware.cores_per_gpu * seconds_data / seconds_compute)
        found.hints.append(
            f"{stage.name}: the GPUs wait for images; give each {needed} cores, or prepare images at 256 pixels "
            "(`mmkd curate --short_side 256`)"
        )
    return found


def _local_rows(stage: Stage, hardware: Hardware) -> tuple[int, int]:
    """Rows of a batch on one GPU, and of one micro-batch."""
    rows = math.ceil(stage.batch_size / hardware.gpus)
    return rows, min(rows, stage.micro_batch_size or rows)


def _operations(stage: Stage, size: ModelSize, hardware: Hardware) -> float:
    """Operations of one pair, with padding and recomputation."""
    tokens, cost = hardware.mean_tokens, size.cost
    text = (cost.token * tokens + cost.token_pair * tokens**2) * hardware.padding
    if not stage.trains:
        return cost.image + text
    rows, micro = _local_rows(stage, hardware)
    again = int(micro < rows) + int(stage.gradient_checkpointing)
    return (cost.image_passes + again) * cost.image + (cost.text_passes + again) * text


def _memory_gb(stage: Stage, size: ModelSize, hardware: Hardware) -> float:
    """Peak memory of a GPU in a step, in 10^9 bytes."""
    rows, micro = _local_rows(stage, hardware)
    cast = BYTES_OF_CAST if hardware.precision == "bf16" else 0
    image, token = size.image_bytes, size.token_bytes
    if not stage.trains:
        layer = image / size.image_layers + token * hardware.mean_tokens / size.text_layers
        return (size.parameters * (4 + cast) + micro * layer) / 1e9 + RESERVED_GB
    frozen = size.parameters - size.trainable
    weights = (size.trainable * BYTES_OF_TRAINING + frozen * 4) / (hardware.gpus if hardware.sharded else 1)
    if stage.gradient_checkpointing:  # the input of every layer, and one whole layer
        image *= CHECKPOINTED_SHARE + 1 / size.image_layers
        token *= CHECKPOINTED_SHARE + 1 / size.text_layers
    activations = micro * (image + token * hardware.mean_tokens * hardware.padding)
    columns = rows * hardware.gpus
    loss = LOSS_MATRICES * rows * columns * 4 + 8 * columns * size.dim * 4
    return (weights + size.parameters * cast + activations + loss) / 1e9 + RESERVED_GB


def fitting(stage: Stage, size: ModelSize, hardware: Hardware) -> Stage | None:
    """The stage with a batch that the GPUs share evenly, its micro-batch halved until it fits; None if none does."""
    stage = replace(stage, batch_size=max(1, stage.batch_size // hardware.gpus) * hardware.gpus)
    micro, _ = _local_rows(stage, hardware)
    while _memory_gb(stage, size, hardware) > GPUS[hardware.gpu]["memory"]:
        if micro <= 1:
            return None
        micro //= 2
        stage = replace(stage, micro_batch_size=micro)
    return stage


def _warnings(stage: Stage, size: ModelSize, hardware: Hardware) -> list[str]:
    """What cannot work, and what would."""
    gpu, room, memory = hardware.gpu, GPUS[hardware.gpu]["memory"], _memory_gb(stage, size, hardware)
    found = []
    if stage.batch_size % hardware.gpus:
        found.append(f"{stage.name}: a batch of {stage.batch_size} cannot be divided evenly among {hardware.gpus} GPUs")
    if hardware.precision == "bf16" and gpu in ("v100", "t4"):
        found.append(f"{stage.name}: {gpu} has no bf16; use --precision fp32")
    if memory <= room:
        return found
    needs = f"{stage.name}: {memory:.0f} GB per GPU do not fit into the {room:g} GB of a {gpu}"
    fits = fitting(stage, size, hardware)
    if fits is not None:
        micro = fits.micro_batch_size
        return [*found, f"{needs}; --micro_batch_size {micro} fits (the same gradient, one more forward pass)"]
    shard = "" if hardware.sharded else "--sharded true (see train/configs/), "
    return [*found, f"{needs}, whatever the micro-batch; use {shard}more GPUs, or a smaller batch"]


def _activation_bytes(model: nn.Module, forward: Callable[[], object]) -> float:
    """Bytes that a forward pass saves for the backward pass, without parameters, each storage once."""
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
