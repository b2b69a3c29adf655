"""Pairs held out of a training split, for folders that come without a validation split, such as the authors'."""

from __future__ import annotations

import hashlib

import numpy as np

from mmkd.data.pair_table import in_columns, take_rows
from mmkd.data.records import PairFolder, open_pairs


def split_off(folder: PairFolder, share: float) -> tuple[PairFolder, PairFolder | None]:
    """Training pairs, and a share of them that is held out for evaluation: whole groups, chosen by hash alone.

    A pair stays on its side whatever others come or go, on any machine and for any seed.

    Args:
        folder: the training split.
        share: of the groups; 0 holds out nothing.

    Raises:
        ValueError: the folder has a validation split of its own, or the share leaves fewer than two pairs to either.
    """
    if not share:
        return folder, None
    if _has_validation_split(folder):
        raise ValueError(f"{folder.path} has a validation split, which is used; leave --hold_out {share} out")
    held = [
        _number(group or id) < share * 2**64
        for ids, groups in in_columns(folder.pairs, ("id", "group"))
        for id, group in zip(ids, groups, strict=True)
    ]
    out, rest = np.flatnonzero(held), np.flatnonzero(np.logical_not(held))
    if min(len(out), len(rest)) < 2:
        raise ValueError(
            f"--hold_out {share} takes {len(out)} of the {len(held)} training pairs of {folder.path} and leaves "
            f"{len(rest)}; either side needs two"
        )
    train, evaluation = (
        PairFolder(folder.path, folder.image_root, take_rows(folder.pairs, rows)) for rows in (rest, out)
    )
    return train, evaluation


def _has_validation_split(folder: PairFolder) -> bool:
    try:
        open_pairs(folder.path, "validation")
    except ValueError:
        return False
    return True


def _number(key: str) -> int:
    """A number below 2^64 that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(f"hold out {key}".encode("utf-8", "surrogatepass")).digest()[:8], "big")
