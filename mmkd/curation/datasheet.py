"""What a curation kept and dropped: ``report.json`` and ``dropped.jsonl`` for machines, ``README.md`` for people."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mmkd.data.table import SPLITS, TABLE_FILE, Pair, PairTable
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


# Section: The datasheet of a curated folder: counts from the columns of its manifest, as JSON, as a page, and as
# charts.


REPORT_FILE, PAGE_FILE = "report.json", "README.md"

WORD_EDGES = (1, 5, 10, 20, 40, 80, 160, 320, 640)

SIDE_EDGES = (1, 64, 128, 224, 256, 384, 512, 768, 1024, 2048)

MOST_STREAM_LINES = 40

CHART_WIDTH, BAR_START, ROW_HEIGHT = 720, 220, 20

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
    charts = _write_charts(folder / "charts", report["contents"])
    atomic_write_text(folder / PAGE_FILE, _page(title, source, report, settings, charts))
    return report


def table_of(title: str, counts: dict[str, int]) -> str:
    """A Markdown table of counts, the first forty."""
    lines = [f"| {name.replace('|', '/')} | {count:,} |" for name, count in list(counts.items())[:MOST_STREAM_LINES]]
    rest = list(counts.values())[MOST_STREAM_LINES:]
    more = [f"| {len(rest)} more | {sum(rest):,} |"] if rest else []
    return "\n".join([f"| {title} | number |", "|---|---:|", *lines, *more])


def _histogram(values: np.ndarray, edges: tuple[int, ...]) -> dict[str, int]:
    numbers, _ = np.histogram(values, bins=[*edges, np.inf])
    names = [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]} or more"]
    return {name: int(number) for name, number in zip(names, numbers, strict=True)}


def _page(title: str, source: str, report: dict[str, Any], settings: dict[str, Any], charts: list[str]) -> str:
    contents, rules = report["contents"], settings["rules"]
    added = report["added_by_splitting"]
    lines = [
        f"# {title}: {report['kept']:,} image-text pairs",
        "",
        f"Curated from {source}: {report['read']:,} samples read"
        + (f", {added:,} pairs added by splitting compound captions" if added else "")
        + f", {report['kept']:,} pairs kept, {sum(report['dropped'].values()):,} dropped. "
        f"{contents['groups']:,} groups (articles, patients); captions have {contents['caption_words_median']:g} "
        "words in the middle.",
        "",
        table_of("dropped because", report["dropped"]) if report["dropped"] else "Nothing was dropped.",
        "",
        *([table_of("mended", report["mended"]), ""] if report["mended"] else []),
        "## Contents",
        *(f"![{name}](charts/{name}.svg)" for name in charts),
        "",
    ]
    for name in ("split", "modality", "license", "panel_type", "caption_words", "short_side"):
        lines += [table_of(name.replace("_", " "), contents[name]), ""]
    lines += ["## Test sets kept out", _test_sets(report["test_sets"]), ""]
    lines += ["## Rules", "", *(f"- {name}: {_shown(value)}" for name, value in _flat(rules).items()), ""]
    lines += [
        "`manifest.arrow` has a row for each pair (pyarrow, pandas, polars and `datasets` read it); its image is named "
        "`shards/NUMBER.tar@OFFSET+SIZE`. The shards are WebDataset tars of `ID.jpg` or `.png`, `.txt` and `.json`.",
        "",
    ]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(value) or "any"
    return ", ".join(map(str, value)) or "any" if isinstance(value, list) else str(value)


def _test_sets(sets: dict[str, Any]) -> str:
    if not sets:
        return "None was named (`--exclude_manifests`)."
    lines = [
        f"- {name}: " + (f"not compared, {entry['skipped']}" if "skipped" in entry else f"{entry['images']:,} images, "
        f"{entry['unreadable']:,} of them unreadable, {entry['listed']:,} articles or sums listed")
        for name, entry in sets.items()
    ]  # fmt: skip
    return "\n".join([*lines, "", "`contamination.jsonl` lists the pairs that were dropped for them."])


def _write_charts(folder: Path, contents: dict[str, Any]) -> list[str]:
    """One SVG bar chart for each of `CHARTS`."""
    for name, title in CHARTS.items():
        chart = bar_chart(f"pairs by {title}", dict(list(contents[name].items())[:MOST_STREAM_LINES]))
        atomic_write_text(folder / f"{name}.svg", chart)
    return list(CHARTS)


def bar_chart(title: str, counts: dict[str, int]) -> str:
    """Counts as horizontal bars, an SVG document."""
    longest = max(counts.values(), default=0) or 1
    height = ROW_HEIGHT * (len(counts) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {CHART_WIDTH} {height}" width="{CHART_WIDTH}" '
        f'height="{height}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="{ROW_HEIGHT}" font-weight="bold">{escape(title)}</text>',
    ]
    for row, (name, count) in enumerate(counts.items(), start=1):
        y, length = ROW_HEIGHT * (row + 0.5), (CHART_WIDTH - BAR_START - 90) * count / longest
        lines += [
            f'<text x="{BAR_START - 8}" y="{y + 13:g}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{BAR_START}" y="{y + 2:g}" width="{length:.1f}" height="{ROW_HEIGHT - 6}" fill="#2f6f8f"/>',
            f'<text x="{BAR_START + length + 6:.1f}" y="{y + 13:g}">{count:,}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def _flat(rules: dict[str, Any]) -> dict[str, Any]:
    return rules["sample"] | {name: value for name, value in rules.items() if name != "sample"}
