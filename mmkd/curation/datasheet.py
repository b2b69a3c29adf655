"""The datasheet of a folder of pairs: ``report.json`` for machines, ``README.md`` and ``charts/`` for people.

Everything is counted from the columns of the manifest and from the account of the run (`mmkd.curation.stream`).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.data.table import TABLE_FILE, PairTable
from mmkd.files import atomic_write_text, write_json
from mmkd.pages.charts import Chart, bars
from mmkd.pages.page import Notes, Page, Section, Table, write_page

MOST_LINES = 40
COLUMNS = ("split", "modality", "label", "license", "panel_type")
REPORT_FILE, PAGE_FILE = "report.json", "README.md"
WORD_EDGES = (1, 5, 10, 20, 40, 80, 160, 320, 640)
SIDE_EDGES = (1, 64, 128, 224, 256, 384, 512, 768, 1024, 2048)
CHARTS = {"modality": "modalities", "caption_words": "caption words", "short_side": "shorter side, pixels"}


def count_columns(table: PairTable) -> dict[str, Any]:
    """Counts of pairs by `COLUMNS`, caption length and image size; a pair without a group is a group of its own."""
    import pyarrow.compute as pc

    counts: dict[str, Any] = {"pairs": len(table)}
    for name in COLUMNS:
        entries = pc.value_counts(table.column(name)).to_pylist()
        named = {entry["values"] or "not stated": entry["counts"] for entry in entries}
        counts[name] = dict(sorted(named.items(), key=lambda item: (-item[1], item[0])))
    groups = table.column("group")
    alone = int(pc.sum(pc.equal(groups, "")).as_py() or 0)
    counts["groups"] = int(pc.count_distinct(groups).as_py()) + alone - bool(alone)
    words = pc.count_substring(table.column("caption"), " ").to_numpy() + 1
    words = words[pc.not_equal(table.column("caption"), "").to_numpy()]
    counts["uncaptioned"] = len(table) - len(words)
    width, height = (table.column(side).to_numpy() for side in ("width", "height"))
    counts["caption_words"] = _histogram(words, WORD_EDGES)
    counts["caption_words_median"] = float(np.median(words)) if len(words) else 0.0
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
    """A table of counts, the most frequent first, with one row for all beyond the first forty."""
    shown = _first(dict(sorted(counts.items(), key=lambda item: -item[1])))
    rest = [count for name, count in counts.items() if name not in shown]
    more = [[f"{len(rest)} more", f"{sum(rest):,}"]] if rest else []
    return Table(title, [title, "number"], [*([name, f"{count:,}"] for name, count in shown.items()), *more])


def _first(counts: dict[str, int]) -> dict[str, int]:
    return dict(list(counts.items())[:MOST_LINES])


def _histogram(values: np.ndarray, edges: tuple[int, ...]) -> dict[str, int]:
    numbers, _ = np.histogram(values, bins=[*edges, np.inf])
    names = [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]} or more"]
    return {name: int(number) for name, number in zip(names, numbers, strict=True)}


def _page(title: str, source: str, report: dict[str, Any], settings: dict[str, Any], charts: list[Chart]) -> Page:
    contents, added = report["contents"], report["added_by_splitting"]
    split = f", {added:,} pairs added by splitting compound captions" if added else ""
    tables = [
        count_table(name, report[key]) for name, key in (("dropped because", "dropped"), ("fixed", "fixed"))
        if report[key]
    ]  # fmt: skip
    rules = [f"{name}: {_shown(value)}" for name, value in settings["rules"].items()]
    columns = (*(name for name in COLUMNS if name != "split"), "caption_words", "short_side")
    return Page(
        f"{title}: {report['kept']:,} image-text pairs",
        [
            *([Section("dropped", "Dropped and fixed", "", tables)] if tables else []),
            Section("splits", "Splits", _split_sentence(report["splits"], contents["groups"]), [
                count_table("split", contents["split"]), *_ignored(report)
            ]),
            Section("contents", "Contents", "", [
                *charts, *(count_table(name.replace("_", " "), contents[name]) for name in columns)
            ]),
            Section("excluded", "Test sets kept out", "", [_test_sets(report["test_sets"])]),
            Section("rules", "Rules", "", [Notes("", rules)]),
            Section("files", "Files", "manifest.arrow has a row for each pair (pyarrow, pandas, polars and datasets "
                    "read it); its image is named shards/NUMBER.tar@OFFSET+SIZE. The shards are WebDataset tars of "
                    "ID.jpg or .png, .txt and .json; dropped.jsonl lists every dropped sample with its reason."),
        ],
        [
            f"Curated from {source}: {report['read']:,} samples read{split}, {report['kept']:,} pairs kept, "
            f"{sum(report['dropped'].values()):,} dropped.",
            f"{contents['groups']:,} groups (articles, patients); captions have {contents['caption_words_median']:g} "
            f"words at the median; {contents['uncaptioned']:,} images have none.",
        ],
    )  # fmt: skip


def _split_sentence(splits: dict[str, int], groups: int) -> str:
    return (
        f"Groups (patients, cases, articles) are never cut: {groups:,} in all, an image without a group is one of its "
        f"own. The source's own split is followed where it states one ({splits['stated']:,} pairs); "
        f"{splits['assigned']:,} had none and were assigned by the hash of the group, stratified by class, "
        f"{splits['moved']:,} moved because their group was given several splits, and {splits['filled']:,} were given "
        f"to a split that was empty. {splits['groups_joined']:,} groups were assigned together with another because "
        f"they have near images; the source itself states different splits for {splits['near_images_across_splits']:,} "
        "pairs and images near them."
    )


def _ignored(report: dict[str, Any]) -> list[Notes]:
    """Names of splits that were ignored, and labels and modalities that were written in another spelling."""
    lines = [
        f"split name {name!r} ({count:,} pairs) is unknown and was ignored"
        for name, count in report["unknown_splits"].items()
    ]
    lines += [
        f"{column} {value!r} was written {spelt!r}"
        for column, values in report["merged_spellings"].items()
        for value, spelt in values.items()
    ]
    return [Notes("Spellings", lines)] if lines else []


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(value) or "any"
    return ", ".join(map(str, value)) or "any" if isinstance(value, list) else str(value)


def _test_sets(sets: dict[str, Any]) -> Notes:
    return Notes(
        "dropped.jsonl lists the pairs that were dropped for them (test_set)." if sets else
        "None was named (--exclude_manifests).",
        [
            f"{name}: " + (f"not compared, {own['skipped']}" if "skipped" in own else f"{own['images']:,} images, "
            f"{own['unreadable']:,} of them unreadable, {own['listed']:,} articles or sums listed")
            for name, own in sets.items()
        ],
    )  # fmt: skip
