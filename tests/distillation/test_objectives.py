import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from waits import Waits

from mmkd.alignment.autoencoder import AlignObjective, AutoencoderAligner
from mmkd.distillation.heads import TeacherHeads
from mmkd.distillation.objective import DistillObjective
from mmkd.distillation.options import DISTILL_LOSSES, DistillOptions, checked_weights, require_width
from mmkd.distillation.weighting import sample_teacher, spread_scales
from mmkd.distributed import allow_tf32
from mmkd.training.contrastive import ContrastiveObjective
from mmkd.training.dataset import rows_of
from mmkd.training.objectives import ObjectiveWrapper
from mmkd.training.settings import TaskLossSettings


class Student(nn.Module):
    """Its embeddings are parameters, so that gradients with respect to them can be read."""

    def __init__(self, image, text, logit_scale):
        super().__init__()
        self.image, self.text = nn.Parameter(image), nn.Parameter(text)
        self.logit_scale = nn.Parameter(torch.tensor([logit_scale]))

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None):
        return SimpleNamespace(image_embeds=self.image, text_embeds=self.text)


def batch(rows=6, teachers=("a", "b"), widths=(8, 8), seed=0, **more):
    g = torch.Generator().manual_seed(seed)

    def features(width, k):
        mask = torch.rand(rows, generator=g) > 0.3
        return {
            "image": torch.randn(rows, width, generator=g),
            "text": torch.randn(rows, width, generator=g),
            "mask": mask,
        }

    both = {name: features(width, k) for k, (name, width) in enumerate(zip(teachers, widths, strict=True))}
    nothing = {"input_ids": torch.zeros(rows, 1), "attention_mask": torch.ones(rows, 1), "pixel_values": None}
    return {**nothing, "index": torch.arange(rows), "epoch": 0, "teachers": both, "aligned": both, **more}


def distill(model, losses, **options):
    """The objective, with heads where they are wanted; keywords that are no option go to the objective itself."""
    own = {key: options.pop(key) for key in ("heads", "dispersions", "seed") if key in options}
    return DistillObjective(model, DistillOptions(losses=losses, **options), **own)


def student(rows=6, dim=8, seed=9):
    g = torch.Generator().manual_seed(seed)
    return Student(torch.randn(rows, dim, generator=g), torch.randn(rows, dim, generator=g), math.log(10))


@pytest.mark.parametrize("case", range(4))
def test_paper_settings_give_the_authors_total_and_gradients(golden, case):
    expected = json.loads((golden / "loss.json").read_text())[case]
    arrays = {name: torch.tensor(array) for name, array in np.load(golden / f"loss_{case}.npz").items()}
    model = Student(arrays["image"], arrays["text"], math.log(expected["logit_scale"]))
    objective = distill(
        model,
        {"task": 1, "feature": 50, "interactive": 1},
        target="random",
        target_norm="stored",
        feature_form="squared",
        interactive_scale="constant",
    )
    rows = len(arrays["image"])
    teacher = {"image": arrays["teacher_image"], "text": arrays["teacher_text"], "mask": torch.ones(rows).bool()}
    parts = objective({**batch(rows), "aligned": {"only": teacher}})
    parts["loss"].backward()
    for name, value in {"task": "task", "feature": "fd", "interactive": "icl", "loss": "total"}.items():
        assert parts[name].item() == pytest.approx(expected[value], abs=1e-5)
    torch.testing.assert_close(model.image.grad, arrays["grad_image"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.text.grad, arrays["grad_text"], atol=1e-5, rtol=0)
    assert objective.interactive_logit_scale is None


def test_the_whole_is_the_weighted_sum_of_its_parts():
    weights = {"task": 0.5, "feature": 3.0, "interactive": 2.0, "relational": 7.0}
    parts = distill(student(), weights)(batch())
    assert set(parts) == {"loss", *weights}
    assert parts["loss"].item() == pytest.approx(sum(weights[name] * parts[name].item() for name in weights), rel=1e-6)


def test_a_loss_without_weight_needs_no_features_and_leaves_no_parameter():
    objective = distill(student(), {"task": 1})
    parts = objective({key: value for key, value in batch().items() if key not in ("teachers", "aligned")})
    assert set(parts) == {"loss", "task"}
    assert [name for name, _ in objective.named_parameters()] == [
        f"model.{n}" for n in ("image", "text", "logit_scale")
    ]


def test_every_parameter_that_learns_gets_a_gradient():
    for weights in ({"relational": 1}, {"feature": 1}, {"interactive": 1}, {"task": 1, "interactive": 1}):
        objective = distill(student(), weights)
        objective(batch())["loss"].backward()
        missing = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []


def test_mean_target_by_hand():
    data, model = batch(), student()
    value = distill(model, {"feature": 1})(data)["feature"].item()
    expected = 0.0
    for modality, own in (("image", model.image), ("text", model.text)):
        for row in range(6):
            known = [F.normalize(t[modality][row], dim=0) for t in data["aligned"].values() if t["mask"][row]]
            if known:
                expected += 1 - F.cosine_similarity(own[row], torch.stack(known).mean(dim=0), dim=0).item()
    assert value == pytest.approx(expected / 6, abs=1e-5)


def test_teachers_are_drawn_among_the_available_by_seed_epoch_and_pair_alone():
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()
    index = torch.tensor([5, 6, 7, 8])
    drawn = sample_teacher(mask, 1, 2, index)
    assert drawn.sum(dim=1).tolist() == [1, 0, 1, 1]
    assert not (drawn & ~mask).any()
    assert torch.equal(sample_teacher(mask[2:], 1, 2, index[2:]), drawn[2:])
    counts = sum(sample_teacher(mask[[0]], 1, epoch, index[[0]]) for epoch in range(300))[0].tolist()
    assert counts[1] == 0
    assert abs(counts[0] - counts[2]) < 60


def test_order_of_teachers_does_not_matter():
    data = batch(teachers=("a", "b", "c"), widths=(8, 8, 8))
    backwards = {key: dict(reversed(data[key].items())) for key in ("teachers", "aligned")}
    for target in ("mean", "random"):
        objective = distill(student(), {"task": 1, "feature": 1, "relational": 1}, target=target)
        torch.testing.assert_close(objective(data)["loss"], objective({**data, **backwards})["loss"])


def test_relational_takes_teachers_of_any_width():
    data = batch(widths=(8, 3))
    assert math.isfinite(distill(student(), {"relational": 1})(data)["loss"].item())


def test_widths_and_weights_are_checked_before_training():
    with pytest.raises(ValueError, match=r"student's features \(512\).*plip 256.*--dim 512"):
        require_width({"clip": 512, "plip": 256}, 512)
    with pytest.raises(ValueError, match=r"unknown loss 'relation'.*'relational'"):
        checked_weights({"relation": 1})
    with pytest.raises(ValueError, match="the weight of task is -1"):
        checked_weights({"task": -1})
    with pytest.raises(ValueError, match="no loss has a weight"):
        checked_weights({"task": 0})


def test_contrastive_objective_trains_the_logit_scale():
    model = student()
    ContrastiveObjective(model)(batch())["loss"].backward()
    assert model.logit_scale.grad.abs().item() > 0


def test_the_task_loss_of_prefixes_is_the_mean_over_cut_embeddings():
    model = student()
    model.config = SimpleNamespace(projection_dim=8)
    losses = [ContrastiveObjective(model, TaskLossSettings(prefix_widths=[3, 5]))(batch())["loss"]]
    for width in (8, 3, 5):
        losses.append(
            ContrastiveObjective(Student(model.image[:, :width], model.text[:, :width], math.log(10)))(batch())["loss"]
        )
    torch.testing.assert_close(losses[0], torch.stack(losses[1:]).mean())


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_the_sigmoid_has_a_bias_that_is_trained_with_the_model(stage):
    model = student()
    if stage == "pretrain":
        objective = ContrastiveObjective(model, TaskLossSettings(task_form="sigmoid"))
    else:
        objective = distill(model, {"task": 1.0}, task_form="sigmoid")
    objective(batch())["task"].backward()
    bias = dict(objective.named_parameters())["task.bias"]
    assert bias.item() == -10 and bias.grad.abs() > 0 and model.logit_scale.grad.abs() > 0


def test_align_objective_reaches_every_layer():
    objective = AlignObjective(AutoencoderAligner({"a": 8, "b": 3}, dim=4))
    parts = objective(batch(widths=(8, 3)))
    assert parts["loss"].item() == pytest.approx((parts["image"] + parts["text"]).item())
    parts["loss"].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


class Towers(nn.Module):
    """Embeds each row by itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.vision, self.words = nn.Linear(5, 8), nn.Embedding(20, 8)
        self.logit_scale = nn.Parameter(torch.tensor([1.0]))

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None):
        if input_ids is None:
            return SimpleNamespace(image_embeds=self.vision(pixel_values))
        return SimpleNamespace(text_embeds=(self.words(input_ids) * attention_mask[:, :, None]).sum(dim=1))


def test_a_batch_may_be_encoded_in_pieces():
    g = torch.Generator().manual_seed(3)
    inputs = {
        "pixel_values": torch.randn(6, 5, generator=g),
        "input_ids": torch.randint(20, (6, 7), generator=g),
        "attention_mask": torch.ones(6, 7, dtype=torch.int64),
    }
    data = batch(**inputs)
    objective = distill(Towers(), {"task": 1, "feature": 1, "interactive": 1, "relational": 1})
    pieces = [
        objective.encode({name: value[rows] for name, value in inputs.items()}) for rows in ([0, 1, 2, 3], [4, 5])
    ]
    joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    whole = objective(data)
    for name, part in objective.loss(joined, data).items():
        torch.testing.assert_close(part, whole[name])


def test_images_without_captions_take_part_in_the_losses_of_images_alone():
    losses = {"task": 1, "affinity": 1, "feature": 1, "interactive": 1, "relational": 1}
    captioned = torch.arange(8) < 6
    embeddings = {side: F.normalize(torch.randn(8, 8), dim=1) for side in ("image", "text")}
    given = batch(8, modality=[""] * 8)
    some = distill(student(8), losses).loss(embeddings, {**given, "captioned": 6})
    every = distill(student(8), losses).loss(embeddings, given)
    without = distill(student(8), losses).loss(rows_of(embeddings, slice(6)), rows_of(given, slice(6)))
    for name in ("task", "affinity", "interactive"):
        torch.testing.assert_close(some[name], without[name])
    objective = distill(student(8), {"relational": 1})
    images = F.normalize(torch.randn(8, 8), dim=1)
    moved = {"image": torch.where(captioned[:, None], embeddings["image"], images), "text": embeddings["text"]}
    first = objective.loss(embeddings, {**given, "captioned": 6})["relational"]
    assert objective.loss(moved, {**given, "captioned": 6})["relational"] != first  # their images count
    moved = {"image": embeddings["image"], "text": torch.where(captioned[:, None], embeddings["text"], images)}
    torch.testing.assert_close(objective.loss(moved, {**given, "captioned": 6})["relational"], first)
    assert every["relational"] != some["relational"]


def test_a_batch_without_any_caption_is_refused():
    with pytest.raises(ValueError, match="no caption at all; raise --batch_size"):
        distill(student(), {"relational": 1})({**batch(), "captioned": 0})


@pytest.mark.parametrize("captioned", [None, 6])
def test_no_loss_waits_for_the_device(captioned):
    options = DistillOptions(
        losses=dict.fromkeys(DISTILL_LOSSES, 1.0), head_form="angular", target="leave_one_out", false_negatives=0.6,
        confidence=0.5, teacher_dropout=0.2, teacher_weights={"ct/a": 2.0}, relational_teachers="available",
    )  # fmt: skip
    heads = TeacherHeads({"image": 8, "text": 8}, {"a": 8, "b": 8})
    objective = DistillObjective(student(8), options, heads=heads, dispersions={"image/a": 0.8, "text/b": 0.7})
    embeddings = {side: F.normalize(torch.randn(8, 8), dim=1).requires_grad_() for side in ("image", "text")}
    more = {} if captioned is None else {"captioned": captioned}
    with Waits() as waits:
        objective.loss(embeddings, {**batch(8, modality=["ct", "mri"] * 4), "epoch": 1, **more})["loss"].backward()
    assert waits.found == []
    with Waits() as waits:
        assert embeddings["image"].grad[torch.arange(8) < 4].norm().item() > 0
    assert waits.found == ["index", "_local_scalar_dense"]


def test_losses_keep_full_fp32_where_the_towers_use_tf32():
    class Recorded(ContrastiveObjective):
        def loss(self, embeddings, batch):
            found.append(torch.get_float32_matmul_precision())
            return super().loss(embeddings, batch)

    found, sides = [], {side: F.normalize(torch.randn(4, 8), dim=1) for side in ("image", "text")}
    try:
        allow_tf32(True)
        ObjectiveWrapper(Recorded(student(4)), "cpu", "fp32").loss(sides, {})
        found.append(torch.get_float32_matmul_precision())
    finally:
        allow_tf32(False)
    assert found == ["highest", "high"]


def test_teachers_without_an_image_text_space_take_part_in_the_relations_alone():
    embeddings = {side: F.normalize(torch.randn(6, 8), dim=1) for side in ("image", "text")}
    options = {"losses": {"affinity": 1, "relational": 1}, "relational_only": ["b"]}
    given = batch(modality=[""] * 6)
    both, one = distill(student(), **options).loss(embeddings, given), batch(modality=[""] * 6)
    one["teachers"] = {"a": given["teachers"]["a"]}
    alone = distill(student(), {"affinity": 1, "relational": 1}).loss(embeddings, one)
    torch.testing.assert_close(both["affinity"], alone["affinity"])
    assert both["relational"] != alone["relational"]


def test_spread_scales_make_narrow_teachers_as_sharp_as_wide_ones():
    generator = torch.Generator().manual_seed(0)
    common, own = torch.randn(1, 64, generator=generator), torch.randn(512, 64, generator=generator)
    mask = torch.ones(512, dtype=torch.bool)
    teachers = {
        name: {"image": common + width * own, "text": common + width * own.flip(1), "mask": mask}
        for name, width in (("narrow", 0.3), ("wide", 3.0))
    }
    scales = spread_scales(teachers, 3.5)
    assert scales["image/narrow"] > 3 * scales["image/wide"]
    for name in teachers:
        unit = F.normalize(teachers[name]["image"], dim=1)
        cosines = (unit @ unit.T)[~torch.eye(512, dtype=torch.bool)].view(512, 511)
        assert (scales[f"image/{name}"] * cosines.std()).item() == pytest.approx(3.5, rel=1e-3)
    teachers["narrow"]["text"] = torch.randn(512, 32)
    assert "across/narrow" not in spread_scales(teachers, 3.5)
