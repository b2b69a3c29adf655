"""What a curation kept and dropped: ``report.json`` and ``dropped.jsonl`` for machines, ``README.md`` for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mmkd.data.records import SPLITS, Pair
from mmkd.files import atomic_write_text, write_json

MOST_LINES = 40


@dataclass(frozen=True)
class CurationReport:
    """The account of a curation: ``read`` rows are the kept pairs and the dropped rows together.

    Attributes:
        read: rows of the collection.
        pairs: what was kept.
        dropped: place in the list -> (reason, file).
        split_counts: rows moved, dealt and carved, see `mmkd.data.splits.assign_splits`.
        unknown_splits: split names that were treated as none, with their counts.
    """

    read: int
    pairs: list[Pair]
    dropped: dict[str, tuple[str, str]]
    split_counts: dict[str, int]
    unknown_splits: dict[str, int]

    @property
    def reasons(self) -> dict[str, int]:
        """Dropped rows by reason."""
        return dict(sorted(Counter(reason for reason, _ in self.dropped.values()).items()))

    def summary(self) -> dict[str, Any]:
        """All counts as JSON values."""
        return {
            "read": self.read,
            "kept": len(self.pairs),
            "dropped": self.reasons,
            "splits": {split: sum(pair.split == split for pair in self.pairs) for split in SPLITS},
            "groups": len({pair.group or pair.id for pair in self.pairs}),
            "rows_of_groups_in_several_splits": self.split_counts["moved"],
            "rows_split_by_hash": self.split_counts["dealt"],
            "rows_given_to_an_empty_split": self.split_counts["carved"],
            "unknown_split_names": self.unknown_splits,
            "modalities": _counts(pair.modality for pair in self.pairs),
            "labels": _counts(pair.label for pair in self.pairs),
            "licenses": _counts(pair.license or "not stated" for pair in self.pairs),
        }


def write_datasheet(folder: Path, report: CurationReport, name: str) -> None:
    """Write ``report.json``, ``dropped.jsonl`` and ``README.md``.

    Args:
        folder: where.
        report: the account.
        name: title of the datasheet.
    """
    lines = [
        json.dumps({"row": place, "file": file, "reason": reason}, ensure_ascii=False) + "\n"
        for place, (reason, file) in report.dropped.items()
    ]
    atomic_write_text(folder / "dropped.jsonl", "".join(lines))
    write_json(folder / "report.json", report.summary())
    atomic_write_text(folder / "README.md", _datasheet(report, name))


def _datasheet(report: CurationReport, name: str) -> str:
    summary = report.summary()
    words = [len(pair.caption.split()) for pair in report.pairs]
    by_split = {split: [pair for pair in report.pairs if pair.split == split] for split in SPLITS}
    return "\n".join(
        [
            f"# {name}: {summary['kept']} image-text pairs",
            "",
            f"{report.read} rows were read, {summary['kept']} kept and {len(report.dropped)} dropped. "
            f"Captions have {min(words)} to {max(words)} words, {median(words):g} in the middle.",
            "",
            _table("dropped because", report.reasons) if report.dropped else "No row was dropped.",
            "",
            "## Splits",
            _table("split", {split: len(pairs) for split, pairs in by_split.items()}),
            "",
            f"Groups (patients, cases, specimens) are never cut: {summary['groups']} in all, an image without a group "
            "being one of its own. The collection's own split is followed where it gives one; "
            f"{report.split_counts['dealt']} rows had none and were dealt out by the hash of their group, "
            f"{report.split_counts['moved']} moved because their group was given several splits, and "
            f"{report.split_counts['carved']} were given to a split that was empty.",
            *[
                f"Split name {name!r} ({count} rows) is not known and was ignored."
                for name, count in report.unknown_splits.items()
            ],
            "",
            "## Contents",
            _table("modality", summary["modalities"]),
            "",
            _table("label", summary["labels"]),
            "",
            _table("license", summary["licenses"]),
            "",
            "Exact duplicates were removed by the SHA-256 of the image file, the held-out copy being kept; near "
            "duplicates were not looked for. See ATTRIBUTION.md where the collection has one.",
            "",
        ]
    )


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(value for value in values if value).items()))


def _table(title: str, counts: dict[str, int]) -> str:
    """A Markdown table of the most frequent values."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [f"| {value.replace('|', '/')} | {count} |" for value, count in ordered[:MOST_LINES]]
    if len(ordered) > MOST_LINES:
        rows.append(f"| {len(ordered) - MOST_LINES} more | {sum(count for _, count in ordered[MOST_LINES:])} |")
    return "\n".join([f"| {title} | rows |", "|---|---:|", *rows])
