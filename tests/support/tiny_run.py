"""A small student distilled on generated pairs: `python tiny_run.py OUTPUT '{"settings": 1}' ...`, also by torchrun.

Captions differ in length and teachers lack some pairs, as in life. Every run of one call is in the same process group.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from transformers import BertConfig, CLIPVisionConfig

import mmkd.train.configs
from mmkd.data.table import Pair
from mmkd.distillation.objective import DistillObjective
from mmkd.distillation.options import DistillOptions
from mmkd.distributed import gather, rank, world_size
from mmkd.student.trainable import enable_gradient_checkpointing
from mmkd.training.batches import identity_of
from mmkd.training.dataset import GlobalBatchSampler
from mmkd.training.loop import fit, start
from mmkd.training.objectives import ObjectiveWrapper
from mmkd.training.settings import LoopSettings
from modeling_mmkd import MMKDClipConfig, MMKDClipModel

PAIRS, DIM, WORDS = 120, 16, 50
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LOSSES = {"task": 1.0, "feature": 1.0, "interactive": 1.0, "relational": 1.0}


def tiny_student():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **SMALL)
    text = BertConfig(vocab_size=WORDS, max_position_embeddings=16, **SMALL)
    return MMKDClipModel(MMKDClipConfig(vision_config=vision, text_config=text, projection_dim=DIM))


class Killed(Exception):
    pass


class Generated:
    """Batches in the order of the real ones, of pairs made from their number."""

    def __init__(self, batch_size, wrong_step=None, caption_runs=False, killed_at=None, order=None):
        self.sampler = GlobalBatchSampler(PAIRS, batch_size, rank(), world_size(), seed=1)
        self.wrong_step, self.caption_runs, self.killed_at, self.order = wrong_step, caption_runs, killed_at, order
        generator = torch.Generator().manual_seed(5)
        self.pixels = torch.randn(PAIRS, 3, 16, 16, generator=generator)
        self.ids = torch.randint(5, WORDS, (PAIRS, 12), generator=generator)
        self.lengths = torch.randint(3, 13, (PAIRS,), generator=generator)
        self.teachers = {
            name: {
                "image": torch.randn(PAIRS, width, generator=generator),
                "text": torch.randn(PAIRS, width, generator=generator),
                "mask": torch.rand(PAIRS, generator=generator) > 0.3,
            }
            for name, width in (("one", DIM), ("two", DIM))
        }

    def __len__(self):
        return len(self.sampler)

    def identity(self):
        return identity_of([Pair(f"p{k}", f"{k}.png", "") for k in range(PAIRS)], self.sampler)

    def epoch(self, epoch, skip=0):
        self.sampler.set_epoch(epoch)
        for number, indices in enumerate(self.sampler):
            if number < skip:
                continue
            step = epoch * len(self) + number
            if step == self.killed_at:
                raise Killed
            if self.order is not None:
                with Path(f"{self.order}.{rank()}").open("a") as file:
                    file.write(json.dumps([step, indices]) + "\n")
            rows = torch.tensor(indices)
            if self.caption_runs:  # as Collate hands them over
                rows = rows[self.lengths[rows].argsort(descending=True, stable=True)]
            mask = (torch.arange(12) < self.lengths[rows][:, None]).long()
            longest = int(mask.sum(dim=1).max())
            teachers = {n: {k: v[rows] for k, v in teacher.items()} for n, teacher in self.teachers.items()}
            if step == self.wrong_step and rank() == world_size() - 1:
                teachers["one"]["image"][:] = torch.nan  # on one process alone
            more = {"text_lengths": self.lengths[rows].tolist()} if self.caption_runs else {}
            yield more | {
                "pixel_values": self.pixels[rows],
                "input_ids": (self.ids[rows] * mask)[:, :longest],
                "attention_mask": mask[:, :longest],
                "index": rows,
                "ids": [f"p{row}" for row in rows.tolist()],
                "teachers": teachers,
                "aligned": teachers,
            }


def fsdp_options():
    """Those of the packaged configuration."""
    file = Path(mmkd.train.configs.__file__).parent / "accelerate_fsdp2.yaml"
    given = yaml.safe_load(file.read_text())["fsdp_config"]
    names = {"fsdp_offload_params": "cpu_offload", "fsdp_version": "fsdp_version"}
    return {names.get(name, name.removeprefix("fsdp_")): value for name, value in given.items()}


def run(output, *, batch_size=24, checkpointing=False, fsdp=False, batches=None, **more):
    """Train and write ``model.safetensors``; returns the objective."""
    values = {"epochs": 2, "learning_rate": 1e-3, "quiet": True, **more}
    settings = LoopSettings(output=Path(output), **values)
    accelerator = start(settings)
    if fsdp:  # accelerate itself chooses it on GPUs alone; from here on all is its code
        accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**fsdp_options())
    student = tiny_student()
    if checkpointing:
        enable_gradient_checkpointing(student)
    objective = DistillObjective(student, DistillOptions(losses=LOSSES), seed=3)
    batches = Generated(batch_size, **(batches or {}))
    fit(
        accelerator,
        objective,
        batches,
        settings,
        lambda folder: save_file(objective.state_dict(), folder / "model.safetensors"),
    )
    return objective


def differences(output):
    """Largest difference between the first two processes' gradients: through the wrapper, and around it."""
    accelerator = Accelerator()
    objective = DistillObjective(tiny_student(), DistillOptions(losses=LOSSES))
    trained = accelerator.prepare(ObjectiveWrapper(objective, "cpu", "fp32"))
    batch = {**next(iter(Generated(24).epoch(0))), "epoch": 0}
    found = []
    for forward in (lambda: trained(ObjectiveWrapper.loss_of_batch, batch), lambda: objective(batch)):
        forward()["loss"].backward()
        both = [gather(parameter.grad.reshape(1, -1)) for parameter in objective.parameters()]
        found.append(max((rows[0] - rows[1]).abs().max().item() for rows in both))
        objective.zero_grad()
    if rank() == 0:
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    for path, chosen in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        if chosen == "differences":
            differences(path)
        else:
            with contextlib.suppress(Killed):
                run(path, **json.loads(chosen))
    if "fsdp" in "".join(sys.argv):
        os._exit(0)  # shards keep gloo's threads beyond their group, and these may abort an interpreter that ends
