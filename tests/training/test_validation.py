import json

import pytest
import tiny_run
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mmkd.data.table import Pair
from mmkd.distillation.objective import DistillObjective
from mmkd.distillation.options import DistillOptions
from mmkd.training.loop import fit, start
from mmkd.training.settings import LoopSettings, ValidationSettings
from mmkd.training.validation import Validation, retrieval


def test_recall_by_hand():
    texts = F.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), dim=1)
    images = F.normalize(torch.tensor([[0.8, 0.62], [1.0, 0.1], [0.1, 1.0]]), dim=1)
    found = retrieval(images, texts, torch.tensor([0, 1, 2]))
    assert found["image_to_text_recall@1"] == pytest.approx(1 / 3)
    assert found["image_to_text_recall@5"] == 1.0
    shared = retrieval(images, texts, torch.tensor([0, 0, 2]))
    assert shared["image_to_text_recall@1"] == 1.0, "equal captions are right for each other"
    alike = retrieval(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4))
    assert alike["image_to_text_recall@1"] == 0.0, "an encoder that says the same of everything gains nothing"


def test_settings_are_checked_before_anything_is_read():
    with pytest.raises(ValueError, match="did you mean 'mean_recall'"):
        ValidationSettings(validate_every=1, best_metric="mean_recal")
    with pytest.raises(ValueError, match="--best_metric loss needs --validate_every"):
        ValidationSettings(best_metric="loss")
    with pytest.raises(ValueError, match="--validate_every is 0"):
        ValidationSettings(validate_every=0)
    with pytest.raises(ValueError, match=r"--hold_out is 1\.5"):
        ValidationSettings(validate_every=1, hold_out=1.5)
    with pytest.raises(ValueError, match=r"--hold_out 0\.1 needs --validate_every"):
        ValidationSettings(hold_out=0.1)


class Runaway(DistillObjective):
    """Its validation loss is best at the second evaluation, whatever it learns."""

    def loss(self, embeddings, batch):
        parts = super().loss(embeddings, batch)
        if not self.training:
            self.seen = getattr(self, "seen", 0) + 1
            kept.append({name: tensor.clone() for name, tensor in self.state_dict().items()})
            parts["loss"] = parts["loss"] * 0 + abs(self.seen - 2)
        return parts


kept = []


@pytest.mark.parametrize("ema", [None, 0.9])
def test_output_is_the_weights_that_were_best(tmp_path, ema):
    kept.clear()
    chosen = LoopSettings(output=tmp_path / "out", epochs=2, quiet=True, ema_decay=ema, learning_rate=0.01)
    objective = Runaway(tiny_run.tiny_student(), DistillOptions(losses=tiny_run.LOSSES))
    pairs = [Pair(f"p{k}", f"{k}.png", f"caption {k}") for k in range(tiny_run.PAIRS)]
    batches = tiny_run.Generated(tiny_run.PAIRS)
    validation = Validation(pairs, batches, every=3, best_metric="loss")

    def write(folder):
        save_file(objective.state_dict(), folder / "model.safetensors")

    fit(start(chosen), objective, tiny_run.Generated(24), chosen, write, validation)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line} == {
        3: 1.0,
        6: 0.0,
        9: 1.0,
        10: 2.0,
    }
    assert 0 <= lines[5]["validation_mean_recall"] <= 1
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in kept[1].items():
        assert torch.equal(written[name], tensor), name
    assert any(not torch.equal(kept[1][name], kept[3][name]) for name in written)
