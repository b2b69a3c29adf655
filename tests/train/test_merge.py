"""``mmkd merge``: an average of two folders, and the choice on validation pairs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmkd.command.settings import parse
from mmkd.data.folder import write_manifest
from mmkd.data.table import Pair
from mmkd.student.folder import load_student, save_student
from mmkd.student.towers import build_model
from mmkd.train.merge import Candidate, MergeSettings, best_of, main


def run(*arguments):
    main(parse(MergeSettings, [*arguments, "--quiet"]))


@pytest.mark.parametrize(
    ("ahead", "error", "chosen"),
    [
        ([0.0, 0.0], [0.01, 0.01], 0.0),  # ties
        ([0.01, 0.02], [0.03, 0.03], 0.0),  # within one standard error
        ([0.01, 0.04], [0.03, 0.03], 1.0),
        ([0.05, 0.04], [0.03, 0.03], 0.5),
        ([0.05, 0.05], [0.03, 0.03], 0.5),  # of equals the one nearer to the start
        ([-0.05, -0.01], [0.001, 0.001], 0.0),
        ([0.05, 0.04], [None, 0.03], 0.0),  # nothing is known of the best
    ],
)
def test_the_rule(ahead, error, chosen):
    others = [Candidate(w, 0.5 + a, a, e) for w, a, e in zip((0.5, 1.0), ahead, error, strict=True)]
    assert best_of([Candidate(0.0, 0.5, 0.0, 0.0), *others]).weight == chosen


def write_colours(folder, validation=True):
    """Pairs of three colours, ten of each in a split; there are no images of test pairs."""
    noise, pairs = np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True)
    for number in range(90):
        colour = number % 3
        pixels = np.full((32, 32, 3), 30) + noise.integers(0, 20, (32, 32, 3))
        pixels[..., colour] += 180
        split = ("train", "validation" if validation else "train", "test")[number // 30]
        if split != "test":
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
        name = ("red", "green", "blue")[colour]
        pairs.append(Pair(f"p{number}", f"{number}.png", f"a {name} picture", "photo", name, f"g{number}", split=split))
    write_manifest(folder, pairs)
    return pairs


def trained_on(pairs, folder, start, path, captions):
    """The model of a folder after some steps on pairs, with these captions."""
    model, processor = load_student(str(start))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    chosen = [pair for pair in pairs if pair.split == "train"][:30]
    images = [Image.open(folder / "images" / pair.image).convert("RGB") for pair in chosen]
    inputs = processor(text=[captions(pair) for pair in chosen], images=images, return_tensors="pt")
    labels = torch.tensor([("red", "green", "blue").index(pair.label) for pair in chosen])
    for _ in range(60):
        logits = model(**inputs).logits_per_image
        same = labels[:, None] == labels[None, :]
        loss = -torch.log_softmax(logits, 1)[same].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_student(path, model, processor)
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A start, the same trained on right captions, and on captions of the next colour."""
    folder = tmp_path_factory.mktemp("merge")
    pairs = write_colours(folder / "pairs")
    start = folder / "start"
    torch.manual_seed(0)
    save_student(start, *build_model("random:tiny", "random:tiny", projection_dim=16, image_size=32))
    wrong = {"red": "green", "green": "blue", "blue": "red"}
    trained_on(pairs, folder / "pairs", start, folder / "right", lambda pair: f"a biomedical image of {pair.label}")
    trained_on(
        pairs, folder / "pairs", start, folder / "wrong", lambda pair: f"a biomedical image of {wrong[pair.label]}"
    )
    return folder


def same_weights(one, other):
    ours, theirs = (load_student(str(folder))[0].state_dict() for folder in (one, other))
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_one_average_is_written(work):
    run(str(work / "start"), str(work / "right"), "--weight", ".5", "--output", str(work / "half"))
    half, start, right = (load_student(str(work / name))[0].state_dict() for name in ("half", "start", "right"))
    assert all(torch.allclose(half[name], (start[name] + right[name]) / 2, atol=1e-6) for name in half)
    with pytest.raises(FileExistsError, match="half exists"):
        run(str(work / "start"), str(work / "right"), "--output", str(work / "half"))


def choose(work, first, second, output, *more):
    arguments = ["--pairs", str(work / "pairs"), "--replicates", "100", *more]
    run(str(work / first), str(work / second), *arguments, "--output", str(work / output))
    return json.loads((work / output / "choice.json").read_text())


def test_a_model_that_is_worse_than_its_start_is_not_the_output(work):
    choice = choose(work, "right", "wrong", "from-wrong")
    worse = choice["candidates"][-1]
    assert worse["weight"] == 1 and worse["ahead"] < -0.1
    assert choice["weight"] == 0 and same_weights(work / "from-wrong", work / "right")


def test_a_model_that_is_better_than_its_start_is_the_output_or_in_it(work):
    choice = choose(work, "start", "right", "from-right")
    values = {own["weight"]: own["value"] for own in choice["candidates"]}
    assert list(values) == [0, 0.25, 0.5, 0.75, 1] and choice["pairs"] == 30
    assert values[choice["weight"]] == max(values.values()) > values[0] + 0.1
    assert not same_weights(work / "from-right", work / "start")
    assert {task.partition("-")[0] for task in choice["tasks"]} == {"zeroshot", "retrieval", "probe"}
    assert not list(work.glob(".from-right.*"))
    two = choose(work, "start", "right", "of-two", "--weight", "1")
    assert [own["weight"] for own in two["candidates"]] == [0, 1] and two["weight"] == 1
    assert same_weights(work / "of-two", work / "right")


def test_without_validation_pairs_the_start_stays(work, tmp_path):
    write_colours(tmp_path / "pairs", validation=False)
    arguments = ["--pairs", str(tmp_path / "pairs"), "--output", str(tmp_path / "chosen")]
    run(str(work / "start"), str(work / "right"), *arguments)
    choice = json.loads((tmp_path / "chosen" / "choice.json").read_text())
    assert choice["weight"] == 0 and "none of the 90 pairs" in choice["not_evaluated"]
    assert same_weights(tmp_path / "chosen", work / "start")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--output", "c"], "give two models, not 1"),
        (["a", "b", "--weight", "1.5", "--output", "c"], "must be 0 to 1"),
        (["a", "b", "--weight", ".2,.4", "--output", "c"], "give one, or --pairs"),
        (["a", "b", "--pairs", "p", "--kinds", "zeroshots", "--output", "c"], "did you mean 'zeroshot'"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(*arguments)
