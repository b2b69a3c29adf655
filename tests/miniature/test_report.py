"""Paired differences of arms over draws, seeds and groups."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from mmkd.miniature.report import Row, Scores, best_control, contrasts, primary, replace_table, summary, table
from mmkd.miniature.tasks import Question
from mmkd.miniature.training import ARMS, CONTROLS, DEFAULT, NO_TEACHER

ROWS = 240


def draw(number):
    rows = np.arange(ROWS)
    classes = rows % 3
    questions = [
        Question("one zero-shot", "seen", "zero-shot", rows, classes, ("a", "b", "c")),
        Question("two probe", "unseen", "probe", rows, classes, ("a", "b", "c")),
    ]
    world = SimpleNamespace(pairs=[SimpleNamespace(group=f"g{row // 2}") for row in rows])
    return SimpleNamespace(number=number, test=questions, world=world)


def rows(accuracies, draws=(1, 2, 3), seeds=3, noises=(0.2, 0.4)):
    generator = np.random.default_rng(0)
    return [
        Row(
            name,
            noise,
            {
                number: [
                    {q: generator.random(ROWS) < accuracy for q in ("one zero-shot", "two probe")} for _ in range(seeds)
                ]
                for number in draws
            },
        )
        for name, accuracy in accuracies.items()
        for noise in noises
    ]


@pytest.fixture(scope="module")
def scores():
    return Scores([draw(1), draw(2), draw(3)], rows({DEFAULT: 0.8, NO_TEACHER: 0.6, "stage 1": 0.79}))


def test_a_score_is_the_mean_over_draws_and_seeds_of_balanced_accuracy():
    given = rows({DEFAULT: 0.7})
    found = Scores([draw(1), draw(2), draw(3)], given)
    every = [own["one zero-shot"] for answers in given[0].answers.values() for own in answers]
    expected = np.mean([[right[np.arange(ROWS) % 3 == k].mean() for k in range(3)] for right in every])
    assert found.of(DEFAULT, 0.2, "one zero-shot")[0] == pytest.approx(expected)


def test_a_clear_difference_is_found_and_none_is_made_up(scores):
    clear = primary(scores, NO_TEACHER)
    assert 15 < clear["low"] < clear["delta"] < clear["high"] < 25
    assert clear["n"] == 2 * ROWS
    found = contrasts(scores, [DEFAULT, NO_TEACHER], ["stage 1"], [0.2])["rows"]
    by_name = {(row["contrast"].rpartition(" - ")[2], row["endpoint"]): row for row in found}
    assert by_name[NO_TEACHER, "seen"]["holm_p"] < 0.05
    assert by_name["stage 1", "seen"]["low"] < 0 < by_name["stage 1", "seen"]["high"]
    assert all(row["holm_p"] >= row["p"] for row in found)


def test_seeds_that_differ_widen_the_interval():
    steady, wild = rows({DEFAULT: 0.7})[0], rows({DEFAULT: 0.7})[0]
    for answers in wild.answers.values():
        answers[0]["one zero-shot"][:] = True
        answers[1]["one zero-shot"][:] = False
    width = {}
    for name, row in (("steady", steady), ("wild", wild)):
        values = Scores([draw(1), draw(2), draw(3)], [row]).of(DEFAULT, 0.2, "one zero-shot")[1:]
        width[name] = np.subtract(*np.percentile(values, (97.5, 2.5)))
    assert width["wild"] > 3 * width["steady"]


def test_the_table_has_chance_normalised_means(scores):
    text = table(scores, [DEFAULT], [0.2], "seen")
    value = scores.mean(DEFAULT, 0.2, ["seen"])[0]
    assert f"{100 * value:.1f} [" in text
    assert f"({100 * (value - 1 / 3) / (2 / 3):.1f})" in text


def test_the_summary_marks_controls_and_goes_between_the_markers_of_a_page(scores, tmp_path):
    rows = contrasts(scores, [DEFAULT, NO_TEACHER], ["stage 1"], [0.2])["rows"]
    text = summary({"rows": rows, "primary": {**primary(scores, NO_TEACHER), "splits": 3, "seeds": 3}})
    delta = rows[0]["delta"]
    assert re.search(rf"^\| control: {NO_TEACHER} \| \*\*\{delta:+.1f} \[", text, re.MULTILINE)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- claim -->\nold\n<!-- /claim -->\nafter\n")
    replace_table(page, text)
    assert page.read_text() == f"before\n<!-- claim -->\n{text}<!-- /claim -->\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the lines"):
        replace_table(page, text)


def test_controls_know_nothing_and_the_best_is_chosen_by_validation():
    assert {ARMS[name].source for name in CONTROLS} == {"none", "own", "permuted", "random", "self"}
    assert best_control({DEFAULT: 0.9, NO_TEACHER: 0.5, "permuted teachers": 0.6}) == "permuted teachers"


def test_every_arm_has_the_same_number_of_trials():
    assert {len(arm.trials) for arm in ARMS.values()} == {3}
