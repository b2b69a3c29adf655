"""DeepSpeed ZeRO: what it cannot do is refused; where it is installed, it trains and resumes as one process does."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from test_distributed import torchrun

from mmkd.training import settings as zero
from mmkd.training.settings import LoopSettings


def accelerator(stage, distributed_type="DistributedType.DEEPSPEED"):
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(distributed_type=distributed_type, num_processes=4, state=state)


def test_what_zero_cannot_do_is_refused_before_the_first_step(tmp_path):
    pieces = LoopSettings(output=tmp_path / "out", batch_size=64, micro_batch_size=8)
    with pytest.raises(ValueError, match=r"--micro_batch_size 8 is below the 16 pairs of a process, and ZeRO-3"):
        zero.refuse(accelerator(3), pieces)
    zero.refuse(accelerator(2), pieces)
    zero.refuse(accelerator(3), LoopSettings(output=tmp_path / "out", batch_size=64, micro_batch_size=16))
    average = LoopSettings(output=tmp_path / "out", ema_decay=0.99)
    with pytest.raises(ValueError, match=r"--ema_decay 0\.99 does not work under DeepSpeed"):
        zero.refuse(accelerator(2), average)
    zero.refuse(accelerator(3, "DistributedType.FSDP"), average)


def test_deepspeed_is_told_batch_and_clipping(tmp_path):
    used = accelerator(2)
    zero.configure(used, LoopSettings(output=tmp_path / "out", batch_size=64, clip_norm=None))
    config = used.state.deepspeed_plugin.deepspeed_config
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_clipping"]) == (16, 0.0)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_stopped_and_resumed_come_to_the_weights_of_one(tmp_path, stage):
    common = {"max_steps": 8, "checkpoint_every": 3}
    tiny_run.run(tmp_path / "one", **common)
    spread = {**common, "zero": stage}
    runs = [(tmp_path / "run", {**spread, "batches": {"killed_at": 5}}), (tmp_path / "run", spread)]
    runs += [(tmp_path / "pieces", {**spread, "micro_batch_size": 5})] * (stage == 2)
    torchrun(tiny_run.__file__, *(text for path, chosen in runs for text in (path, json.dumps(chosen))))
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for path, _ in runs[1:]:
        for name, tensor in load_file(path / "model.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)
