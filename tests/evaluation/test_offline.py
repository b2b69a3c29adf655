"""The documented run: its simulated deaths have the hazard they are said to have, its verdicts can fail."""

import numpy as np
from offline_page import known
from offline_results import verdict
from simulate_cohort import EFFECT, simulated

from mmkd.evaluation.statistics.survival import Outcomes, concordance


def test_simulated_deaths_have_the_hazard_and_the_tables_share_of_deaths():
    generator = np.random.default_rng(0)
    table = Outcomes(generator.exponential(30.0, 4000), generator.uniform(size=4000) < 0.3)
    risks, death, end = simulated(table, generator)
    outcomes = Outcomes(np.minimum(death, end), death <= end)
    assert abs(outcomes.event.mean() - table.event.mean()) < 0.002
    assert abs(np.corrcoef(np.log(end), risks)[0, 1]) < 0.05, "censoring must not know the risk"
    slope = np.polyfit(risks, np.log(death), 1)[0]
    assert abs(slope + EFFECT) < 0.1, "log time falls by the effect for each unit of risk"
    assert 0.75 < concordance(outcomes, risks, np.ones((1, 4000)))[0] < 0.9
    assert concordance(outcomes, -death, np.ones((1, 4000)))[0] > 0.9999


def task(random, told):
    rows = {
        name: {"accuracy": dict(zip(("value", "low", "high"), own, strict=True))}
        for name, own in (("random", random), ("told", told))
    }
    return {
        "kind": "zeroshot",
        "variant": "",
        "dataset": "toy",
        "primary_metric": "accuracy",
        "chance": {"accuracy": 0.25},
        "rows": rows,
    }


def test_failures_are_printed_as_failures():
    good = verdict(task((0.3, 0.2, 0.4), (1.0, 1.0, 1.0)))
    bad = verdict(task((0.4, 0.3, 0.5), (0.8, 0.7, 0.9)))
    assert good["passed"] and not bad["random_at_chance"] and not bad["told_near_one"]
    shown = known({"verdicts": {"good": good, "bad": bad}})
    assert "holds chance on 1 of 2 tasks, not on bad;" in shown and "**not** near one on bad" in shown
    rows = {line.split(" | ")[0]: line for line in shown.splitlines() if line.startswith("| ")}
    assert rows["| bad"].count("**NO**") == 2 and "NO" not in rows["| good"]
