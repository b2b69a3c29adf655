"""The same global batch gives the same model: in one piece, in several, on several processes, with spread weights."""

import json
from itertools import pairwise

import pytest
import step_memory
import tiny_run
import torch
from processes import forked, in_group
from safetensors.torch import load_file

from mmkd.distillation.objective import DistillObjective
from mmkd.distillation.options import DistillOptions
from mmkd.student.trainable import set_training_mode
from mmkd.training.dataset import micro_batches
from mmkd.training.gradient_cache import cached_backward, set_seed
from mmkd.training.objectives import ObjectiveWrapper

STEPS = 10


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process, the batch in one piece."""
    folder = tmp_path_factory.mktemp("reference") / "one"
    tiny_run.run(folder, batches={"order": f"{folder}.order"})
    assert len(log(folder)) == STEPS
    return folder


def weights_file(folder):
    return folder / "model.safetensors"


def weights(folder):
    return load_file(weights_file(folder))


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(folder, reference):
    expected = weights(reference)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=f"{folder.name}: {name}")
    for ours, theirs in zip(log(folder), log(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_pieces_of_a_batch_on_one_process(tmp_path, reference):
    for name, more in {"pieces": {}, "checkpointed": {"checkpointing": True}}.items():
        tiny_run.run(tmp_path / name, micro_batch_size=7, **more)
        assert_same_run(tmp_path / name, reference)


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """One process and batches of 48, whose captions are padded to the longest."""
    folder = tmp_path_factory.mktemp("padded") / "one"
    tiny_run.run(folder, batch_size=48)
    return folder


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes(tmp_path, reference, padded, processes):
    """Without and with pieces, in one process group; on two also with weights spread by FSDP2, and captions in runs."""
    runs = {"whole": {}, "pieces": {"micro_batch_size": 4}}
    if processes == 2:
        runs["spread"] = {"fsdp": True, "micro_batch_size": 5, "checkpoint_every": 4}
        in_runs = {"batch_size": 48, "batches": {"caption_runs": True}}
        runs |= {"captions": in_runs, "captions in pieces": {**in_runs, "micro_batch_size": 16}}
        runs["spread captions"] = {**in_runs, "fsdp": True, "micro_batch_size": 16}
    wanted = list(runs.items())
    stopped = {"checkpoint_every": 4}
    wanted += [("stopped", {**stopped, "batches": {"killed_at": 7}}), ("stopped", stopped)]
    arguments = [text for name, more in wanted for text in (tmp_path / name, json.dumps(more))]
    in_group(tiny_run.__file__, tmp_path / "gradients.json", "differences", *arguments, processes=processes)
    assert weights_file(tmp_path / "stopped").read_bytes() == weights_file(tmp_path / "whole").read_bytes()
    for name, more in runs.items():
        assert_same_run(tmp_path / name, padded if "batches" in more else reference)
        assert all("useful_tokens" in line for line in log(tmp_path / name)) == ("batches" in more)
    through, around = json.loads((tmp_path / "gradients.json").read_text())
    assert through == 0.0
    assert around > 1e-4, "without the wrapper each process would have had its own gradient"


def test_resumed_at_another_number_of_processes(tmp_path, reference):
    """The rest of the run reads the same pairs in the same order, and comes to the same weights."""
    with pytest.raises(tiny_run.Killed):
        tiny_run.run(tmp_path / "cut", checkpoint_every=4, batches={"killed_at": 6})
    order = {"checkpoint_every": 4, "batches": {"order": str(tmp_path / "cut.order")}}
    wrong = {"max_steps": 5, "batches": {"wrong_step": 2}}
    runs = [(tmp_path / "cut", order), (tmp_path / "wrong", wrong)]
    said = in_group(tiny_run.__file__, *(text for path, more in runs for text in (path, json.dumps(more))))
    assert "step-00000004 was written by 1 processes, now there are 2" in said
    assert_same_run(tmp_path / "cut", reference)
    alone = order_of(reference.with_name(f"{reference.name}.order.0"))
    first, second = (order_of(tmp_path / f"cut.order.{rank}") for rank in range(2))
    assert [step for step, _ in first] == list(range(4, STEPS))
    assert [(step, a + b) for (step, a), (_, b) in zip(first, second, strict=True)] == alone[4:]

    # A pair of the second process alone is not finite: both skip the step, and the first tells of all its pairs.
    tiny_run.run(tmp_path / "alone", **wrong)
    skipped = [
        {line["step"]: (line["loss"], line["skipped"]) for line in log(tmp_path / name) if "skipped" in line}
        for name in ("wrong", "alone")
    ]
    assert skipped == [{3: (None, 1)}] * 2
    for name, tensor in weights(tmp_path / "wrong").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "alone")[name], atol=1e-5, rtol=0)
    told = next(line for line in said.splitlines() if "step skipped, not finite: step 3" in line)
    assert all(f"p{row}" in told for row in alone[2][1])


def order_of(path):
    return [(step, rows) for step, rows in map(json.loads, path.read_text().splitlines())]


def gradients(objective, batch, **caching):
    device = ObjectiveWrapper(objective, "cpu", "fp32")
    objective.zero_grad()
    if caching:
        cached_backward(
            device, batch, to_device=lambda b: b, backward=lambda x: x.backward(), without_sync=Nothing, **caching
        )
    else:
        set_seed(1)
        device(ObjectiveWrapper.loss_of_batch, batch)["loss"].backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters()}


class Nothing:
    def __enter__(self): ...

    def __exit__(self, *error): ...


@pytest.fixture
def batch():
    return {**next(iter(tiny_run.Generated(24, caption_runs=True).epoch(0))), "epoch": 0}


def test_pieces_summed_without_the_cache_would_be_another_gradient(batch):
    objective = DistillObjective(tiny_run.tiny_student(), DistillOptions(losses=tiny_run.LOSSES))
    set_training_mode(objective, dropout=0.0)
    exact = gradients(objective, batch)
    cached = gradients(objective, batch, micro_batch_size=5, seed=(1,))
    for name, gradient in exact.items():
        torch.testing.assert_close(cached[name], gradient, atol=1e-6, rtol=1e-4)
    objective.zero_grad()
    for piece in micro_batches(batch, 12):
        (objective(piece)["loss"] / 2).backward()
    plain = objective.model.visual_projection.weight.grad
    difference = (plain - exact["model.visual_projection.weight"]).norm() / plain.norm()
    assert difference > 0.05


def test_memory_of_a_large_batch_is_that_of_a_piece_and_the_embeddings():
    """In one piece the batch of 256 would take some 350 MB more than the piece of 16."""
    cases = [forked(step_memory.__file__, case) for case in ("16:16", "256:16")]
    piece, batch = (json.loads(case.stdout)["growth_mb"] for case in cases)
    assert batch < piece + 40


def test_dropout_draws_the_same_in_both_passes(batch):
    """Each piece's gradient belongs to the very embeddings that were compared."""
    objective = DistillObjective(tiny_run.tiny_student(), DistillOptions(losses=tiny_run.LOSSES))
    set_training_mode(objective, dropout=0.5)
    cached = gradients(objective, batch, micro_batch_size=5, seed=(1, 2))
    objective.zero_grad()
    encoded = []
    for number, piece in enumerate(micro_batches(batch, 5)):
        set_seed(1, 2, number)
        encoded.append(objective.encode(piece))
    joined = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
    objective.loss(joined, batch)["loss"].backward()
    for name, p in objective.named_parameters():
        torch.testing.assert_close(cached[name], p.grad, atol=1e-6, rtol=1e-4)


def test_pieces_are_of_like_length_and_without_shared_padding(batch):
    cut = micro_batches(batch, 6)
    assert [id for piece in cut for id in piece["ids"]] == batch["ids"] and len(set(batch["ids"])) == 24
    lengths = [piece["attention_mask"].sum(dim=1) for piece in cut]
    assert all(a.min() >= b.max() for a, b in pairwise(lengths))  # longest first
    assert [piece["input_ids"].shape[1] for piece in cut] == [int(n.max()) for n in lengths]
    assert torch.equal(torch.cat([piece["index"] for piece in cut]), batch["index"])
