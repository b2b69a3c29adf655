"""The plan of a training: figures by hand, warnings with what would work, and the command."""

import json
from dataclasses import replace

import pytest
import torch
from captioned_batches import model

from mmkd.student.flops import StepCost
from mmkd.train.plan import PlanSettings, main
from mmkd.training import planning
from mmkd.training.planning import Hardware, ModelSize, Stage, estimate, measure

SIZE = ModelSize(
    parameters=200_000_000,
    trainable=200_000_000,
    cost=StepCost(image=35e9, token=1.7e8, token_pair=3.7e4, image_passes=3, text_passes=3),
    image_bytes=175e6,
    token_bytes=2e6,
    image_layers=12,
    text_layers=12,
    dim=512,
)
STAGE = Stage(name="distill", pairs=1_000_000, epochs=2, batch_size=1024)
ASSUMED = {"efficiency": 0.5, "images_per_core": 1000, "cores_per_gpu": 100, "mean_tokens": 100, "padding": 1.0}
GPUS = Hardware(gpu="h100", gpus=8, price=2.0, **ASSUMED)


def test_time_and_price_by_hand():
    found = estimate(STAGE, SIZE, GPUS)
    pair = 3 * (35e9 + 1.7e10 + 3.7e8)
    hours = 2_000_000 * pair / (8 * 0.5 * 989e12) / 3600
    assert found.hours == pytest.approx(hours)
    assert (found.gpu_hours, found.price) == (pytest.approx(8 * hours), pytest.approx(16 * hours))
    assert found.steps == 1954
    assert found.limit == "compute" and not found.warnings and not found.hints


def test_memory_by_hand():
    found = estimate(STAGE, SIZE, GPUS)
    activations = 128 * (175e6 + 100 * 2e6)
    loss = 6 * 128 * 1024 * 4 + 8 * 1024 * 512 * 4
    assert found.memory_gb == pytest.approx((200e6 * 18 + activations + loss) / 1e9 + 3.0)
    sharded = estimate(STAGE, SIZE, replace(GPUS, sharded=True))
    assert found.memory_gb - sharded.memory_gb == pytest.approx(200e6 * 16 * 7 / 8 / 1e9)


def test_recomputing_costs_a_forward_pass_and_saves_memory():
    plain = estimate(STAGE, SIZE, GPUS)
    for change in ({"micro_batch_size": 32}, {"gradient_checkpointing": True}):
        other = estimate(replace(STAGE, **change), SIZE, GPUS)
        assert other.hours == pytest.approx(plain.hours * 4 / 3)
        assert other.memory_gb < plain.memory_gb / 2


def test_what_does_not_fit_is_told_with_what_does():
    large = replace(STAGE, batch_size=4096)
    (warning,) = estimate(large, SIZE, GPUS).warnings
    assert "do not fit into the 80 GB of a h100; --micro_batch_size 128 fits" in warning
    fitting = replace(large, micro_batch_size=128)
    assert not estimate(fitting, SIZE, GPUS).warnings
    assert planning.fitting(large, SIZE, GPUS) == fitting and planning.fitting(STAGE, SIZE, GPUS) == STAGE
    assert planning.fitting(replace(STAGE, batch_size=1001), SIZE, GPUS).batch_size == 1000
    huge = replace(SIZE, parameters=6_000_000_000, trainable=6_000_000_000)
    (warning,) = estimate(STAGE, huge, replace(GPUS, gpu="a100")).warnings
    assert planning.fitting(STAGE, huge, replace(GPUS, gpu="a100")) is None
    assert "whatever the micro-batch; use --sharded true" in warning
    warnings = estimate(replace(STAGE, batch_size=1000), SIZE, replace(GPUS, gpu="v100", gpus=3)).warnings
    assert "divided evenly among 3" in warnings[0] and "no bf16" in warnings[1]


def test_slow_decoding_is_the_limit():
    found = estimate(STAGE, SIZE, replace(GPUS, cores_per_gpu=1))
    assert found.limit == "decoding" and found.hours == pytest.approx(2_000_000 / 8 / 1000 / 3600)
    assert "cores" in found.hints[0] and not found.warnings


def test_activations_are_measured():
    student = model().train()
    found = measure(student, 16, "fp32")
    assert found.parameters == sum(parameter.numel() for parameter in student.parameters())
    tokens, width = 5, 16  # of an image, of a layer
    least = 2 * tokens * 4 * (4 * width + 32)  # two layers keep at least queries, keys, values, their sum and a hidden
    assert least < found.image_bytes < 20 * least
    with torch.no_grad():
        student.text_model.requires_grad_(False)
    frozen = measure(student, 16, "fp32")
    assert frozen.token_bytes < found.token_bytes / 3
    assert frozen.cost.text_passes == 1


def test_the_command_prints_figures_assumptions_and_warnings(tmp_path, capsys):
    model().save_pretrained(tmp_path / "student")
    common = {"model": str(tmp_path / "student"), "pairs": 10_000, "output": tmp_path / "plan.json"}
    main(PlanSettings(gpus=4, gpu="a100", batch_size=1024, precision="fp32", **common))
    text = capsys.readouterr().out
    for part in ("pretrain", "extract", "distill", "total", "measured:", "assumed: 4 x a100", "2.5 per GPU hour"):
        assert part in text
    for stage in ("pretrain", "distill"):
        assert f"fits: mmkd {stage} --num_processes 4 --batch_size 1024 --precision fp32 --epochs 20 ..." in text
    stages = json.loads((tmp_path / "plan.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["pretrain", "extract", "distill"]
    with pytest.raises(SystemExit):
        main(PlanSettings(gpus=3, gpu="a100", batch_size=1024, **common))
    assert "warning: pretrain: a batch of 1024 cannot be divided evenly among 3 GPUs" in capsys.readouterr().out


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"--gpu h1000 is not known; give one of .*h100"):
        main(PlanSettings(gpu="h1000"))
    with pytest.raises(ValueError, match="--gpus is 0"):
        PlanSettings(gpus=0)
    with pytest.raises(ValueError, match=r"--efficiency is 1\.5"):
        PlanSettings(efficiency=1.5)
