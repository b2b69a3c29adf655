"""What a curation kept and dropped: ``report.json`` and ``dropped.jsonl`` for machines, ``README.md`` for people."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mmkd.data.table import SPLITS, TABLE_FILE, Pair, PairTable
from mmkd.files import atomic_write_text, write_json
from mmkd.pages.charts import Chart, bars
from mmkd.pages.page import Notes, Page, Section, Table, write_page

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
    write_page(folder / PAGE_FILE, _datasheet(report, name))


def _datasheet(report: CurationReport, name: str) -> Page:
    summary = report.summary()
    words = [len(pair.caption.split()) for pair in report.pairs]
    counts = report.split_counts
    groups = (
        f"Groups (patients, cases, specimens) are never cut: {summary['groups']} in all, an image without a group is "
        "one of its own. The dataset's own split is followed where it gives one; "
        f"{counts['dealt']} rows had none and were assigned by the hash of their group, {counts['moved']} moved "
        f"because their group was given several splits, and {counts['carved']} were given to a split that was empty."
    )
    ignored = [
        f"Split name {split!r} ({count} rows) is not known and was ignored."
        for split, count in report.unknown_splits.items()
    ]
    duplicates = (
        "Exact duplicates were removed by the SHA-256 of the image file, the held-out copy being kept; near duplicates "
        "were not searched. See ATTRIBUTION.md where the dataset has one."
    )
    contents = {"modality": summary["modalities"], "label": summary["labels"], "license": summary["licenses"]}
    return Page(
        f"{name}: {summary['kept']} image-text pairs",
        [
            Section("splits", "Splits", groups, [
                count_table("split", summary["splits"]),
                *([Notes("Ignored:", ignored)] if ignored else []),
            ]),
            Section("contents", "Contents", duplicates, [count_table(title, own) for title, own in contents.items()]),
            *([Section("dropped", "Dropped", "", [count_table("dropped because", report.reasons)])]
              if report.dropped else []),
        ],
        [
            f"{report.read} rows were read, {summary['kept']} kept and {len(report.dropped)} dropped. Captions have "
            f"{min(words)} to {max(words)} words, {median(words):g} in the middle."
        ],
    )  # fmt: skip


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(value for value in values if value).items()))


REPORT_FILE, PAGE_FILE = "report.json", "README.md"

WORD_EDGES = (1, 5, 10, 20, 40, 80, 160, 320, 640)

SIDE_EDGES = (1, 64, 128, 224, 256, 384, 512, 768, 1024, 2048)

CHARTS = {"modality": "modalities", "caption_words": "caption words", "short_side": "shorter side, pixels"}


def count_columns(table: PairTable) -> dict[str, Any]:
    """Counts of a manifest's pairs by split, modality, licence, panel type, caption length and image size."""
    import pyarrow.compute as pc

    counts: dict[str, Any] = {"pairs": len(table)}
    for name, column in (
        ("split", "split"),
        ("modality", "modality"),
        ("license", "license"),
        ("panel_type", "panel_type"),
    ):
        entries = pc.value_counts(table.column(column)).to_pylist() if len(table) else []
        named = {entry["values"] or "not stated": entry["counts"] for entry in entries}
        counts[name] = dict(sorted(named.items(), key=lambda item: (-item[1], item[0])))
    groups = table.column("group")
    counts["groups"] = int(pc.count_distinct(groups).as_py()) if len(table) else 0
    spaces = pc.count_substring(table.column("caption"), " ").to_numpy() + 1
    width, height = (table.column(side).to_numpy() for side in ("width", "height"))
    counts["caption_words"] = _histogram(spaces, WORD_EDGES)
    counts["caption_words_median"] = float(np.median(spaces)) if len(table) else 0.0
    counts["short_side"] = _histogram(np.minimum(width, height), SIDE_EDGES)
    return counts


def write_sheet(
    folder: Path, title: str, source: str, account: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Write ``report.json``, ``README.md`` and ``charts/`` of a folder with a manifest.

    Args:
        folder: where ``manifest.arrow`` lies.
        title: name of the folder of pairs.
        source: name of what was curated.
        account: counts of the run, see `mmkd.curation.stream`.
        settings: the settings of the run.

    Returns:
        The report.
    """
    report = account | {"contents": count_columns(PairTable(folder / TABLE_FILE))}
    write_json(folder / REPORT_FILE, report)
    charts = [
        replace(bars(f"pairs by {words}", _first(report["contents"][name])), file=f"charts/{name}.svg")
        for name, words in CHARTS.items()
    ]
    for chart in charts:
        atomic_write_text(folder / chart.file, chart.svg)
    write_page(folder / PAGE_FILE, _page(title, source, report, settings, charts))
    return report


def count_table(title: str, counts: dict[str, int]) -> Table:
    """A table of counts, the most frequent first, what lies beyond the first forty together."""
    shown = _first(dict(sorted(counts.items(), key=lambda item: -item[1])))
    rest = [count for name, count in counts.items() if name not in shown]
    more = [[f"{len(rest)} more", f"{sum(rest):,}"]] if rest else []
    return Table.of(title, [title, "number"], [*([name, f"{count:,}"] for name, count in shown.items()), *more])


def _first(counts: dict[str, int]) -> dict[str, int]:
    return dict(list(counts.items())[:MOST_LINES])


def _histogram(values: np.ndarray, edges: tuple[int, ...]) -> dict[str, int]:
    numbers, _ = np.histogram(values, bins=[*edges, np.inf])
    names = [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]} or more"]
    return {name: int(number) for name, number in zip(names, numbers, strict=True)}


def _page(title: str, source: str, report: dict[str, Any], settings: dict[str, Any], charts: list[Chart]) -> Page:
    contents, added = report["contents"], report["added_by_splitting"]
    split = f", {added:,} pairs added by splitting compound captions" if added else ""
    rules = {**settings["rules"]["sample"], **{k: own for k, own in settings["rules"].items() if k != "sample"}}
    tables = [
        count_table(name, report[key]) for name, key in (("dropped because", "dropped"), ("fixed", "mended"))
        if report[key]
    ]  # fmt: skip
    columns = ("split", "modality", "license", "panel_type", "caption_words", "short_side")
    return Page(
        f"{title}: {report['kept']:,} image-text pairs",
        [
            *([Section("dropped", "Dropped and fixed", "", tables)] if tables else []),
            Section("contents", "Contents", "", [
                *charts, *(count_table(name.replace("_", " "), contents[name]) for name in columns)
            ]),
            Section("excluded", "Test sets kept out", "", [_test_sets(report["test_sets"])]),
            Section("rules", "Rules", "", [Notes("", [f"{name}: {_shown(value)}" for name, value in rules.items()])]),
            Section("files", "Files", "manifest.arrow has a row for each pair (pyarrow, pandas, polars and datasets "
                    "read it); its image is named shards/NUMBER.tar@OFFSET+SIZE. The shards are WebDataset tars of "
                    "ID.jpg or .png, .txt and .json."),
        ],
        [
            f"Curated from {source}: {report['read']:,} samples read{split}, {report['kept']:,} pairs kept, "
            f"{sum(report['dropped'].values()):,} dropped.",
            f"{contents['groups']:,} groups (articles, patients); captions have {contents['caption_words_median']:g} "
            "words in the middle.",
        ],
    )  # fmt: skip


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(value) or "any"
    return ", ".join(map(str, value)) or "any" if isinstance(value, list) else str(value)


def _test_sets(sets: dict[str, Any]) -> Notes:
    return Notes(
        "contamination.jsonl lists the pairs that were dropped for them." if sets else
        "None was named (--exclude_manifests).",
        [
            f"{name}: " + (f"not compared, {own['skipped']}" if "skipped" in own else f"{own['images']:,} images, "
            f"{own['unreadable']:,} of them unreadable, {own['listed']:,} articles or sums listed")
            for name, own in sets.items()
        ],
    )  # fmt: skip
