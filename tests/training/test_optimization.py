import pytest
import tiny_run
import torch
from torch import nn

from mmkd.distillation.heads import TeacherHeads
from mmkd.distillation.objective import DistillObjective
from mmkd.distillation.options import DistillOptions
from mmkd.training.contrastive import ContrastiveObjective
from mmkd.training.optimizer import WeightAverage, build_optimizer, clamp_scales, rate_factors, set_learning_rate
from mmkd.training.settings import LoopSettings, check


def settings(folder, **more):
    return LoopSettings(output=folder / "out", **more)


def test_parts_and_layers_learn_at_their_own_rate(tmp_path):
    objective = ContrastiveObjective(tiny_run.tiny_student())
    factors = rate_factors(objective, {"vision_model": 0.1, "vision_model.post_layernorm": 0.5}, layer_decay=0.5)
    assert factors["model.visual_projection.weight"] == 1.0
    assert factors["model.logit_scale"] == 1.0
    assert factors["model.text_model.encoder.layer.1.output.dense.weight"] == 1.0
    assert factors["model.text_model.encoder.layer.0.output.dense.weight"] == 0.5
    assert factors["model.text_model.embeddings.word_embeddings.weight"] == 0.25
    vision = {name: factor for name, factor in factors.items() if "vision_model" in name}
    assert vision.pop("model.vision_model.post_layernorm.weight") == 0.5
    assert set(map(str, vision.values())) == {"0.1", "0.05", "0.025", "0.5"}
    chosen = settings(tmp_path, layer_decay=0.5, learning_rate=8.0)
    optimizer = build_optimizer(objective, chosen)
    assert set_learning_rate(optimizer, 0, 10, chosen) == 8.0
    assert {group["lr"] for group in optimizer.param_groups} == {8.0, 4.0, 2.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(objective.parameters()))


def test_what_an_objective_has_beside_the_model_learns_at_its_own_rate():
    heads = TeacherHeads({"image": 16, "text": 16}, {"PLIP": 8})
    options = DistillOptions(losses={"task": 1, "heads": 1}, head_form="angular")
    factors = rate_factors(DistillObjective(tiny_run.tiny_student(), options, heads=heads), {"heads": 10.0})
    assert {factor for name, factor in factors.items() if name.startswith("heads.")} == {10.0}
    assert {factor for name, factor in factors.items() if not name.startswith("heads.")} == {1.0}


def test_a_factor_for_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match=r"--learning_rate_factors.visoin: the model has no 'visoin'; its parts are"):
        rate_factors(ContrastiveObjective(tiny_run.tiny_student()), {"visoin": 0.1})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ema_decay": 1.0}, "--ema_decay is 1.0"),
        ({"layer_decay": 0.0}, "--layer_decay is 0.0"),
        ({"micro_batch_size": 0}, "--micro_batch_size is 0; it must be at least 1, or null"),
        ({"learning_rate_factors": {"text_model": 0.0}}, "or --freeze text_model"),
        ({"skipped_in_a_row": 0}, "--skipped_in_a_row is 0"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        check(settings(tmp_path, **wrong))


def test_average_by_hand_and_swap():
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    average = WeightAverage(layer, decay=0.5)
    expected = 1.0
    for step in range(40):
        with torch.no_grad():
            layer.weight.fill_(float(step))
        average.update(layer, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.applied(layer):
        assert layer.weight.item() == pytest.approx(expected, rel=1e-5)
    assert layer.weight.item() == 39.0


def test_scales_stay_within_their_bounds():
    scales = [torch.tensor([9.0]), torch.tensor([-1.0]), torch.tensor([2.0])]
    clamp_scales(scales)
    assert [round(scale.item(), 3) for scale in scales] == [4.605, 0.0, 2.0]
