"""The device is checked before it is used."""

import pytest
import torch

from mmkd.distributed import chosen_device


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", ""])
def test_a_device_that_is_not_here_is_one_line(name):
    with pytest.raises(ValueError, match=f"^--device {name} cannot be used here .*; give auto, cpu, cuda or cuda:1$"):
        chosen_device(name)


def test_auto_takes_what_there_is():
    assert chosen_device("auto") == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert chosen_device("cpu") == "cpu"
