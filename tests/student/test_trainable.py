import pytest
import torch
from torch import nn

from mmkd.student.trainable import freeze, set_training_mode


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)) for _ in range(3)
        )
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_model, self.text_model = Tower(), Tower()
        self.logit_scale = nn.Parameter(torch.zeros(1))


def learning(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_freeze_a_tower_a_module_a_parameter_or_its_first_layers():
    model = Model()
    freeze(model, ["vision_model", "logit_scale", "text_model[:2]"])
    assert learning(model) == {
        f"text_model.{name}"
        for name in (
            "layers.2.0.weight",
            "layers.2.0.bias",
            "layers.2.1.weight",
            "layers.2.1.bias",
            "norm.weight",
            "norm.bias",
        )
    }


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("vision", "has no 'vision'; its parts are vision_model, text_model"),
        ("text_model[:9]", "text_model has 3 layers"),
        ("words[:1]", "has no 'words'"),
    ],
)
def test_an_unknown_part_is_refused(part, message):
    with pytest.raises(ValueError, match=message):
        freeze(Model(), [part])


def test_freezing_everything_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(Model(), ["vision_model", "text_model", "logit_scale"])


def test_training_mode_keeps_batch_statistics_and_frozen_parts_still():
    model = Model()
    freeze(model, ["vision_model"])
    set_training_mode(model, dropout=0.0)
    assert not model.vision_model.training
    assert model.text_model.training
    assert not model.text_model.layers[0][1].training
    assert {m.p for m in model.text_model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    set_training_mode(model, dropout=0.5)
    assert {m.p for m in model.text_model.modules() if isinstance(m, nn.Dropout)} == {0.5}
    assert not model.vision_model.layers[0][2].training
