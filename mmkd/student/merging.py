"""Weighted averages of two models of one architecture, such as a student and the model that it started from.

Between a model and its fine-tuned version, the average of the weights is often better than both, and more robust
(WiSE-FT, Wortsman et al. 2022, https://arxiv.org/abs/2109.01903). An average costs nothing at inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkd.encoders.spec import installed_versions
from mmkd.encoders.weights import require_same_keys
from mmkd.student.folder import PACKAGES, load_student, save_student, starting_weights
from modeling_mmkd import MMKDClipModel

NOT_ARCHITECTURE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def mixed(first: Mapping[str, Tensor], second: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """``(1 - weight) * first + weight * second``, tensor by tensor; exact at the ends.

    Running statistics of batch normalization are averaged like weights. This package's training leaves them as they
    were, so a student and its start have the same, and no data is needed. Whole numbers (counters, positions) are those
    of the nearer model.

    Args:
        first: the tensors of one model.
        second: the tensors of the other, of the same names and shapes.
        weight: share of the second model, 0 to 1.

    Returns:
        New tensors in the wider precision of the two, on the device of the first.

    Raises:
        ValueError: a weight out of range, or names or shapes that differ.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of the second model is {weight}; it must be 0 to 1")
    require_same_keys(dict(second), dict(first), "the second model")
    state: dict[str, Tensor] = {}
    for name, one in first.items():
        other = second[name].to(one.device)
        if not one.is_floating_point():
            state[name] = (other if weight > 0.5 else one).clone()
            continue
        mean = torch.lerp(one.float(), other.float(), weight)
        state[name] = mean.to(torch.promote_types(one.dtype, other.dtype))
    return state


class ModelPair:
    """Two models of one architecture in memory, whose averages are written as folders."""

    def __init__(self, first: str, second: str) -> None:
        """Load both.

        Args:
            first: folder or Hub id; its image processor and tokenizer are those of every average.
            second: folder or Hub id.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the models differ in architecture, image preprocessing or vocabulary.
        """
        self.names = (first, second)
        (self._model, self._processor), (other, other_processor) = load_student(first), load_student(second)
        ours, theirs = (_described(*loaded) for loaded in ((self._model, self._processor), (other, other_processor)))
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if differing:
            raise ValueError(
                f"{first} and {second} differ in {', '.join(differing)}; only models of one architecture with the same "
                "preprocessing and vocabulary can be averaged"
            )
        self._states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = (
            {name: tensor.clone() for name, tensor in self._model.state_dict().items()},
            other.state_dict(),
        )

    def write(self, folder: Path, weight: float) -> None:
        """Write the average as a ``from_pretrained`` folder, with a provenance that names the models in it.

        Args:
            folder: to write into.
            weight: share of the second model; see `mixed`.
        """
        self._model.load_state_dict(mixed(*self._states, weight))
        save_student(folder, self._model, self._processor, merging_provenance(self.names, weight))


def merging_provenance(names: Sequence[str], weight: float) -> dict[str, Any]:
    """The provenance of an average; a model of share 0 is not in it."""
    shares = (1 - weight, weight)
    used = [(name, share) for name, share in zip(names, shares, strict=True) if share > 0]
    return {
        "stage": "merge",
        "teachers": [],
        "started_from": [{**starting_weights(name), "share": share} for name, share in used],
        "versions": installed_versions(PACKAGES),
    }


def _described(model: MMKDClipModel, processor: Any) -> dict[str, Any]:
    """What two models must have in common, by name."""
    described = {f"config.{key}": value for key, value in _architecture(model.config.to_dict()).items()}
    pixels = processor.image_processor
    described |= {f"image {name}": getattr(pixels, name) for name in ("crop_size", "size", "image_mean", "image_std")}
    return described | {"vocabulary": processor.tokenizer.get_vocab()}


def _architecture(config: Any) -> Any:
    """A configuration without what may differ between runs."""
    if isinstance(config, dict):
        return {key: _architecture(value) for key, value in config.items() if key not in NOT_ARCHITECTURE}
    return config
