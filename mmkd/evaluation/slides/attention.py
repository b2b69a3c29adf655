"""Gated attention over the tiles of a slide or case; the weights of tiles are learned (Ilse et al., 2018).

``a_k = softmax_k(w^T (tanh(V h_k) * sigmoid(U h_k)))`` over the tiles ``k`` of one bag and ``z = sum_k a_k h_k``, from
which one linear layer answers. Bags differ in length, so tiles of several bags lie one after another in one matrix,
with the number of its bag beside each: nothing is padded. Training takes 4096 tiles of a bag at a time, testing all.
The number of epochs is fixed: nothing is selected on test data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmkd.distributed import chosen_device
from mmkd.evaluation.embeddings.embed import Vectors

HIDDEN, ATTENTION, DROPOUT = 256, 128, 0.25
EPOCHS, LEARNING_RATE, WEIGHT_DECAY, TILES = 20, 3e-4, 1e-5, 4096
LEAST_SPREAD = 1e-6
Read = Callable[[int], Vectors]
Loss = Callable[[Tensor, Tensor], Tensor]


class GatedAttention(nn.Module):
    """From the tiles of some bags to one answer for each."""

    def __init__(self, width: int, outputs: int) -> None:
        """Fix widths.

        Args:
            width: of a tile's features.
            outputs: numbers that a bag gets.
        """
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT))
        self.values, self.gates = nn.Linear(HIDDEN, ATTENTION), nn.Linear(HIDDEN, ATTENTION)
        self.score, self.answer = nn.Linear(ATTENTION, 1), nn.Linear(HIDDEN, outputs)

    def forward(self, tiles: Tensor, bag: Tensor, bags: int) -> Tensor:
        """Tiles ``(T, width)`` and the bag of each ``(T,)`` to answers ``(bags, outputs)``."""
        hidden = self.reduce(tiles)
        score = self.score(torch.tanh(self.values(hidden)) * torch.sigmoid(self.gates(hidden))).squeeze(1)
        weight = segment_softmax(score, bag, bags)
        pooled = hidden.new_zeros(bags, hidden.shape[1]).index_add(0, bag, weight[:, None] * hidden)
        return self.answer(pooled)


def segment_softmax(scores: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Softmax of ``scores`` ``(T,)`` within each segment, numbers ``(T,)`` below ``segments``."""
    highest = scores.new_full((segments,), -torch.inf).scatter_reduce(0, segment, scores.detach(), "amax")
    raised = (scores - highest[segment]).exp()
    return raised / raised.new_zeros(segments).index_add(0, segment, raised)[segment]


def train_attention(
    read: Read,
    bags: Sequence[int],
    targets: Tensor,
    outputs: int,
    loss: Loss,
    seed: int,
    together: int = 1,
    epochs: int = EPOCHS,
) -> Callable[[Sequence[int]], Vectors]:
    """Train on bags and return how to answer for others.

    Args:
        read: number of a bag -> its tiles ``(N, width)``.
        bags: those to train on.
        targets: what the loss takes, one row for each of ``bags``.
        outputs: numbers that a bag gets.
        loss: of answers ``(b, outputs)`` and their targets, a mean over the bags.
        seed: of weights, dropout, order and tiles.
        together: bags of one step.
        epochs: how many.

    Returns:
        From bags to answers ``(b, outputs)``, all tiles taken.
    """
    device = chosen_device("auto")
    mean, spread = tile_moments(read, bags)
    choice = np.random.default_rng(seed)
    steps = epochs * -(-len(bags) // together)
    with torch.random.fork_rng(devices=[device] if device != "cpu" else []):
        torch.manual_seed(seed)
        model = GatedAttention(len(mean), outputs).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            order = choice.permutation(len(bags))
            for start in range(0, len(order), together):
                rows = order[start : start + together]
                parts = [(sampled(read(bags[row]), choice) - mean) / spread for row in rows]
                answers = _answer(model, parts, device)
                value = loss(answers, targets[torch.from_numpy(rows)].to(device))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
    model.eval()

    @torch.no_grad()
    def answer(others: Sequence[int]) -> Vectors:
        rows = [_answer(model, [(read(bag) - mean) / spread], device) for bag in others]
        return torch.cat(rows).cpu().numpy()

    return answer


def sampled(tiles: Vectors, choice: np.random.Generator) -> Vectors:
    """At most 4096 tiles, drawn without replacement."""
    return tiles if len(tiles) <= TILES else tiles[np.sort(choice.choice(len(tiles), TILES, replace=False))]


def tile_moments(read: Read, bags: Sequence[int]) -> tuple[Vectors, Vectors]:
    """Mean and spread ``(width,)`` over the tiles of bags, each bag with equal weight."""
    first = second = np.zeros(1)
    for bag in bags:
        tiles = read(bag).astype(np.float64)
        first, second = first + tiles.mean(axis=0) / len(bags), second + np.square(tiles).mean(axis=0) / len(bags)
    spread = np.sqrt(np.maximum(second - np.square(first), 0))
    return first.astype(np.float32), np.where(spread > LEAST_SPREAD, spread, 1.0).astype(np.float32)


def _answer(model: nn.Module, parts: Sequence[Vectors], device: str) -> Tensor:
    lengths = torch.tensor([len(part) for part in parts])
    bag = torch.repeat_interleave(torch.arange(len(parts)), lengths).to(device)
    return model(torch.from_numpy(np.concatenate(parts)).to(device), bag, len(parts))
