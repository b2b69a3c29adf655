"""Who sees which groups, and captions as wrong as those of figures.

Teachers' groups, the student's groups and those of the test are disjoint; validation groups are taken out of the
student's share, and every choice is made on them.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mmkd.data.records import Pair
from mmkd.data.splits import hashed

PARTS = ("teachers", "student", "validation", "test")
SHARES = {"teachers": 0.45, "student": 0.25, "validation": 0.10, "test": 0.20}
SHARES_OF = {"vqa_rad": {"teachers": 0.25, "student": 0.40, "validation": 0.10, "test": 0.25}}
VAGUE = (
    "Representative image.",
    "Figure panel, see text for details.",
    "Imaging of the patient.",
    "Findings at presentation.",
    "Typical case from our series.",
    "Image obtained during the examination.",
)


def deal(pairs: Sequence[Pair], seed: int) -> dict[str, list[Pair]]:
    """Pairs by part: whole groups, every label of every collection in the same shares.

    Args:
        pairs: all of them.
        seed: of the order in which the groups of a label are dealt out.
    """
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.group or f"pair {pair.id}"].append(pair)
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, members in groups.items():
        strata[members[0].source, members[0].label].append(name)
    dealt: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for (source, _), names in sorted(strata.items()):
        names.sort(key=lambda name: hashed(seed, name))
        bounds = np.cumsum([SHARES_OF.get(source, SHARES)[part] for part in PARTS]) * len(names)
        for position, name in enumerate(names):
            part = PARTS[min(int(np.searchsorted(bounds, position + 0.5)), len(PARTS) - 1)]
            dealt[part] += groups[name]
    return dealt


def with_noise(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], dict[str, str]]:
    """The same pairs, a share of them with another pair's caption or one that says nothing.

    Args:
        pairs: the student's.
        share: of pairs whose caption is replaced, half of them by the caption of a pair drawn at random that has
            another caption, half by a vague sentence.
        seed: of the draw; a larger share keeps the replacements of a smaller one.

    Returns:
        The pairs, and pair id -> ``wrong`` or ``vague``.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(pairs))
    donors = generator.integers(0, len(pairs), len(pairs))
    changed = list(pairs)
    kinds: dict[str, str] = {}
    for turn, position in enumerate(order[: round(share * len(pairs))]):
        pair = pairs[position]
        donor = int(donors[position])
        while pairs[donor].caption == pair.caption:
            donor = (donor + 1) % len(pairs)
        wrong = turn % 2 == 0
        caption = pairs[donor].caption if wrong else VAGUE[turn // 2 % len(VAGUE)]
        changed[position] = dataclasses.replace(pair, caption=caption)
        kinds[pair.id] = "wrong" if wrong else "vague"
    return changed, kinds
