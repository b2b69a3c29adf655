"""Several processes on one machine (gloo), started as a user starts them."""

import textwrap

import torch
from processes import torchrun

from mmkd.distributed import gather, gather_lists, mean_over_processes, rank, world_size


def test_one_process_needs_no_group():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather(rows) is rows
    assert (rank(), world_size()) == (0, 1)
    assert gather_lists(["a"]) == ["a"]
    assert not mean_over_processes(rows).requires_grad


PROGRAM = """
import sys
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from mmkd.distributed import gather, gather_lists, mean_over_processes, rank, wait_for_everyone, world_size
from mmkd.training.objectives import contrastive

Accelerator()
assert world_size() == 2
rows = torch.arange(6.0).reshape(2, 3) + 100 * rank()
assert torch.equal(gather(rows), torch.cat([torch.arange(6.0).reshape(2, 3) + 100 * r for r in range(2)]))
assert gather(torch.tensor([rank() == 0])).tolist() == [True, False]
assert gather_lists([f"p{rank()}"]) == ["p0", "p1"]
assert mean_over_processes(torch.tensor([2.0 * rank()])).item() == 1.0

g = torch.Generator().manual_seed(0)
whole = [torch.randn(6, 5, generator=g, dtype=torch.float64) for _ in range(2)]
own = [part[3 * rank() : 3 * rank() + 3].clone().requires_grad_() for part in whole]
image, text = (F.normalize(part, dim=1) for part in own)
loss = contrastive(image, text, gather(image), gather(text), 20.0, 3 * rank())
loss.backward()
reference = [part.clone().requires_grad_() for part in whole]
image, text = (F.normalize(part, dim=1) for part in reference)
expected = contrastive(image, text, image, text, 20.0)
expected.backward()
torch.testing.assert_close(mean_over_processes(loss), expected.detach(), rtol=1e-6, atol=0)
for part, full in zip(own, reference):
    # the mean over processes, as DDP takes it, of what each contributes to its own rows
    torch.testing.assert_close(part.grad / 2, full.grad[3 * rank() : 3 * rank() + 3], rtol=1e-5, atol=1e-7)
wait_for_everyone()
"""


def test_gathered_loss_has_the_gradient_of_the_whole_batch(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    torchrun(program)
