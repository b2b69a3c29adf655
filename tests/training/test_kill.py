"""Killed at any moment and started again, a run ends in the same bytes; `kill_moments.py` visits more moments."""

import kill_moments
import pytest
import torch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    threads = torch.get_num_threads()
    output = tmp_path_factory.mktemp("whole") / "run"
    found = kill_moments.moments_of_a_run(output)
    yield found, kill_moments.result(output)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("number", range(6))
def test_kill_and_start_again(tmp_path, whole, number):
    found, expected = whole
    moment = kill_moments.chosen(found, 6, seed=11)[number]
    kill_moments.survives(tmp_path / "run", moment, expected)
