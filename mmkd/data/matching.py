"""Whether features belong to the pairs they are used with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice

import numpy as np

from mmkd.data.features import TeacherFeatures
from mmkd.data.pair import Pair
from mmkd.data.pair_fingerprints import SHOWN, changes, fingerprinted
from mmkd.distributed import rank

logger = logging.getLogger(__name__)


def seen_pairs(features: TeacherFeatures, pairs: Sequence[Pair], place: object) -> np.ndarray:
    """Which of n pairs at least one teacher has seen, (n,) bool, all of them as they are now.

    Stores that were written without fingerprints are taken as they are, with a warning.

    Args:
        features: of the teachers.
        pairs: what they are used for.
        place: where the features lie, for the message.

    Raises:
        ValueError: captions or images have changed since the features were made; with their number and first ids.
    """
    parts = [np.zeros(0, dtype=bool)]
    counts: dict[str, dict[str, int]] = {}
    first: dict[str, None] = {}
    for ids, now in fingerprinted(pairs):
        seen = np.zeros(len(ids), dtype=bool)
        for names, known, before in features.seen_as(ids):
            seen |= known
            for what, wrong in changes(before, now).items():
                if wrong.any():
                    own = counts.setdefault(", ".join(names), {})
                    own[what] = own.get(what, 0) + int(wrong.sum())
                    if len(first) < SHOWN:
                        first |= dict.fromkeys(ids[row] for row in np.flatnonzero(wrong)[:SHOWN].tolist())
        parts.append(seen)
    if counts:
        listed = "; ".join(
            f"{name}: {' and '.join(f'{count} {what}' for what, count in own.items())}" for name, own in counts.items()
        )
        raise ValueError(
            f"{place} holds features of other captions or images than these {len(pairs)} pairs have now ({listed}; "
            f"first {', '.join(islice(first, SHOWN))}). Extract (and align) again into a new folder, use the pairs "
            "that were extracted, or give pairs that changed new ids"
        )
    without = [name for name, store in features.stores.items() if not store.ids.has_fingerprints]
    if without and rank() == 0:
        logger.warning(
            "%s: the features of %s do not say which captions and images they are of; a change would go unnoticed",
            place,
            ", ".join(without),
        )
    return np.concatenate(parts)
