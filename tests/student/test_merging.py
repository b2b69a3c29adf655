import json

import pytest
import torch
from tiny_model import save_tiny

from mmkd.student.folder import load_student, read_provenance
from mmkd.student.merging import ModelPair, mixed


def state(offset):
    weight = torch.arange(6.0).reshape(2, 3) + offset
    return {"weight": weight, "running_mean": torch.full((3,), 2.0 * offset), "count": torch.tensor(10 * offset)}


def test_the_average_by_hand():
    first, second = state(1), state(5)
    found = mixed(first, second, 0.25)
    assert torch.allclose(found["weight"], torch.arange(6.0).reshape(2, 3) + 2)
    assert torch.equal(found["running_mean"], torch.full((3,), 4.0))
    assert found["count"] == 10 and mixed(first, second, 0.75)["count"] == 50
    for weight, expected in ((0, first), (1, second)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in mixed(first, second, weight).items())
    found["weight"].zero_()
    assert first["weight"].any()


def test_half_precision_is_averaged_in_single_precision():
    one, other = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    assert mixed({"w": one}, {"w": other}, 0.5)["w"].dtype == torch.bfloat16
    wide = mixed({"w": one}, {"w": other.float()}, 0.5)["w"]
    assert wide.dtype == torch.float32 and wide.item() == 1.00390625


@pytest.mark.parametrize(
    ("second", "weight", "message"),
    [
        ({"w": torch.zeros(2)}, 1.5, "0 to 1"),
        ({"w": torch.zeros(3)}, 0.5, "instead of"),
        ({"v": torch.zeros(2)}, 0.5, "second model"),
    ],
)
def test_what_cannot_be_averaged_is_refused(second, weight, message):
    with pytest.raises(ValueError, match=message):
        mixed({"w": torch.zeros(2)}, second, weight)


def perturbed(path):
    """The tiny model with other weights."""
    model, processor = load_student(str(save_tiny(path)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_folders_are_averaged_and_name_where_they_come_from(tmp_path):
    first, second = save_tiny(tmp_path / "start"), perturbed(tmp_path / "trained")
    pair = ModelPair(str(first), str(second))
    states = [load_student(str(folder))[0].state_dict() for folder in (first, second)]
    for weight in (0.25, 0.0, 1.0):
        pair.write(tmp_path / f"{weight}", weight)
        found = load_student(str(tmp_path / f"{weight}"))[0].state_dict()
        expected = mixed(*states, weight)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    shares = {
        w: {s["weights"]: s["share"] for s in read_provenance(tmp_path / w)["started_from"]} for w in ("0.25", "0.0")
    }
    assert shares == {"0.25": {"start": 0.75, "trained": 0.25}, "0.0": {"start": 1.0}}
    assert str(tmp_path) not in json.dumps(read_provenance(tmp_path / "0.25"))


def test_models_of_another_form_are_refused_with_what_differs(tmp_path):
    first = save_tiny(tmp_path / "a")
    with pytest.raises(ValueError, match="text_pooling"):
        ModelPair(str(first), str(save_tiny(tmp_path / "b", text_pooling="mean")))
    other = save_tiny(tmp_path / "c")
    for settings in (other / "preprocessor_config.json", other / "processor_config.json"):
        settings.write_text(settings.read_text().replace("0.48145466", "0.5"))
    with pytest.raises(ValueError, match="image_mean"):
        ModelPair(str(first), str(other))
