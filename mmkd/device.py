"""Where encoders compute: the device that was named, checked before anything is loaded onto it."""

from __future__ import annotations

import os

import torch


def chosen_device(name: str) -> str:
    """The device of that name; for ``auto`` this process' GPU if there is one, else the processor.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); give auto, cpu, cuda or cuda:1") from None
    return name
