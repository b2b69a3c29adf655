"""Two processes with half of the batch each have the loss and the gradient of one with the whole, in every part."""

import textwrap

from processes import in_group

PROGRAM = """
import math

import torch
from accelerate import Accelerator

from mmkd.distillation import objective as stage2
from mmkd.distillation import targets
from mmkd.distillation.heads import TeacherHeads
from mmkd.distillation.options import DistillOptions
from mmkd.distributed import mean_over_processes, rank, settle_group, wait_for_everyone
from mmkd.training import chunked_loss, contrastive, objectives
from mmkd.training.dataset import rows_of

settle_group(str(Accelerator().distributed_type))
chunked_loss.LARGEST_MATRIX["cpu"] = 48  # three rows of a whole batch at a time
ROWS, DIM, WIDTHS = 16, 8, {"a": 6, "b": 8, "c": 5}
LOSSES = {"task": 0.5, "affinity": 0.7, "feature": 2.0, "interactive": 1.0, "relational": 3.0, "heads": 1.5}


def teachers(widths):
    g = torch.Generator().manual_seed(1)
    return {
        name: {
            "image": torch.randn(ROWS, width, generator=g),
            "text": torch.randn(ROWS, width, generator=g),
            "mask": torch.rand(ROWS, generator=g) > 0.3,
        }
        for name, width in widths.items()
    }


class Student(torch.nn.Module):
    def __init__(self, rows):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        image, text = torch.randn(ROWS, DIM, generator=g), torch.randn(ROWS, DIM, generator=g)
        self.image, self.text = torch.nn.Parameter(image[rows].clone()), torch.nn.Parameter(text[rows].clone())
        self.logit_scale = torch.nn.Parameter(torch.tensor([math.log(20.0)]))


def parts_of(rows, options, some_without_caption):
    torch.manual_seed(0)
    model = Student(rows)
    heads = TeacherHeads({"image": DIM, "text": DIM}, WIDTHS)
    dispersions = {f"{side}/{name}": 0.8 for side in ("image", "text") for name in WIDTHS}
    objective = stage2.DistillObjective(model, options, heads=heads, dispersions=dispersions)
    cut = lambda store: rows_of(store, rows)
    batch = {
        "teachers": cut(teachers(WIDTHS)),
        "aligned": cut(teachers(dict.fromkeys(WIDTHS, DIM))),
        "index": torch.arange(ROWS)[rows],
        "modality": [("ct", "mri")[k % 2] for k in torch.arange(ROWS)[rows].tolist()],
        "epoch": 3,
    }
    if some_without_caption:
        batch["captioned"] = 6 if len(batch["modality"]) == 8 else 12
    normal = {side: torch.nn.functional.normalize(getattr(model, side), dim=1) for side in ("image", "text")}
    parts = objective.loss(normal, batch)
    parts["loss"].backward()
    return objective, parts


def options(**more):
    return DistillOptions(
        losses=LOSSES, affinity_scale="own", head_form="angular", teacher_weights={"ct/a": 2.0}, false_negatives=0.6,
        confidence=0.5, teacher_dropout=0.2, teacher_scale=8.0, relational_scale=6.0, **more,
    )


def relative(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


for target, without in (("mean", False), ("random", False), ("leave_one_out", False), ("mean", True)):
    half = torch.arange(8) + 8 * rank()
    own, parts = parts_of(half, options(target=target), without)
    gather = objectives.gather
    stage2.gather = targets.gather = objectives.gather = lambda rows: rows
    objectives.rank = lambda: 0
    order = torch.cat([torch.arange(6), torch.arange(8, 14), torch.tensor([6, 7, 14, 15])])  # those with captions first
    whole, expected = parts_of(order, options(target=target), without)
    stage2.gather = targets.gather = objectives.gather = gather
    objectives.rank = rank
    for name, value in expected.items():
        assert relative(mean_over_processes(parts[name]), value.detach()) < 1e-6, (target, name)
    for name, parameter in own.named_parameters():
        full = whole.get_parameter(name).grad
        if name in ("model.image", "model.text"):
            assert relative(parameter.grad / 2, full[order.argsort()][half]) < 1e-6, (target, name)
        else:  # scales and heads, whose gradients DDP averages
            assert relative(mean_over_processes(parameter.grad), full) < 2e-6, (target, name)

# Stage 1 as released: what other processes compare with is constant.
normalize = torch.nn.functional.normalize
half, everyone = slice(8 * rank(), 8 * rank() + 8), Student(slice(None))
student = Student(half)
objective = contrastive.ContrastiveObjective(student, gather_gradient=False)
sides = {side: normalize(getattr(student, side), dim=1) for side in ("image", "text")}
loss = objective.loss(sides, {})["loss"]
loss.backward()
image, text = (normalize(getattr(everyone, side), dim=1) for side in ("image", "text"))
classes, scale = torch.arange(ROWS)[half], everyone.logit_scale.exp()
to_texts = torch.nn.functional.cross_entropy(scale * image[half] @ text.detach().T, classes)
to_images = torch.nn.functional.cross_entropy(scale * text[half] @ image.detach().T, classes)
((to_texts + to_images) / 2).backward()
for side in ("image", "text"):
    assert relative(getattr(student, side).grad, getattr(everyone, side).grad[half]) < 1e-5, side
wait_for_everyone()
"""


def test_every_part_and_its_gradient(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    in_group(program)
