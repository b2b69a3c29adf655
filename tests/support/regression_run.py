"""A small regression trained by the loop, with batches whose order is noted: `python regression_run.py FOLDER SECONDS`.

The program waits some seconds for every batch, and writes a checkpoint after every step.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mmkd.training.loop import fit, start
from mmkd.training.objectives import Objective
from mmkd.training.settings import BatchSettings, LoopSettings


class Regression(Objective):
    """A few random layers with dropout, batch normalization and a scale that runs away without clamping."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.logit_scale = nn.Parameter(torch.tensor([4.6]))

    def encode(self, batch):
        return {"y": self.layers(batch["x"])}

    def loss(self, embeddings, batch):
        error = (embeddings["y"] - batch["y"]).square().mean()
        return {"loss": error - self.logit_scale.sum(), "error": error}


class Numbers:
    def __init__(self, steps=5, wrong_at=()):
        self.steps, self.wrong_at, self.read = steps, wrong_at, []

    def __len__(self):
        return self.steps

    def identity(self):
        return {"pairs": 6 * self.steps}

    def epoch(self, epoch, skip=0):
        for number in range(skip, self.steps):
            self.read.append((epoch, number))
            g = torch.Generator().manual_seed(100 * epoch + number)
            x = torch.randn(6, 4, generator=g)
            if (epoch, number) in self.wrong_at:
                x[0, 0] = math.nan
            yield {"x": x, "y": x.sum(dim=1, keepdim=True), "ids": [f"pair-{epoch}-{number}-{k}" for k in range(6)]}


@dataclasses.dataclass(kw_only=True)
class Settings(LoopSettings, BatchSettings):
    """As a recipe's."""


def settings(folder, **more):
    values = {"epochs": 3, "learning_rate": 1e-2, "dropout": 0.3, "quiet": True, "checkpoint_every": 4}
    values |= {"trackers": ["none"], **more}
    return Settings(output=folder / "model", **values)


def train(chosen, batches=None):
    accelerator = start(chosen)
    objective = Regression()
    fit(
        accelerator,
        objective,
        batches or Numbers(),
        chosen,
        lambda folder: save_file(objective.state_dict(), folder / "model.safetensors"),
    )
    return objective


class Slow(Numbers):
    """Waits before every batch."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def epoch(self, epoch, skip=0):
        for batch in super().epoch(epoch, skip):
            time.sleep(self.seconds)
            yield batch


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(settings(Path(sys.argv[1]), checkpoint_every=1), Slow(float(sys.argv[2])))
