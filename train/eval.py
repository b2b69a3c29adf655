"""Evaluate: student, teachers and their ensemble on the same held-out images, with intervals and paired differences.

    mmkd eval --encoders student,biomedclip,plip --pairs pairs
    mmkd eval --encoders student,biomedclip,features:features/PLIP --suite offline --data data
    mmkd eval --workers 2 --encoders student,biomedclip --datasets busi.yaml,kvasir.yaml --data data
    mmkd eval --watch runs/distill --encoders biomedclip,plip --suite offline --data data

Every encoder embeds images and texts once; all tasks read that cache. Each result (encoder x task) is one file, written
whole, so that the same command after a kill, or with one more encoder, computes only what is missing. Tasks of any
executor embed; results are then computed in this process, and are the same bytes wherever tasks ran.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from mmkd.command.settings import check_arguments, run
from mmkd.evaluation.settings import EvalSettings

if __name__ == "__main__":
    check_arguments(EvalSettings)  # before the imports that take seconds

from mmkd.command.settings import resolved, save_settings
from mmkd.evaluation.embeddings.encoders import named_sources
from mmkd.evaluation.report.page import write_report
from mmkd.evaluation.results.summary import lock_of, versions
from mmkd.evaluation.run import evaluate
from mmkd.evaluation.settings import ReportSettings, check
from mmkd.evaluation.statistics.bootstrap import as_text
from mmkd.evaluation.watch import STUDENT, watch
from mmkd.files import write_json


def main(settings: EvalSettings) -> None:
    """Embed, evaluate, compare, and write ``summary.json``, ``repro.lock`` and the report.

    Raises:
        FileNotFoundError: the pairs, a manifest or an encoder's folder do not exist.
        ValueError: settings that cannot work, or nothing to evaluate on.
    """
    if settings.watch is None:
        sources = named_sources(settings.encoders)
        check(settings, sources)
        run_once(settings, sources)
        return
    sources = named_sources([f"{STUDENT}={settings.watch}", *settings.encoders])
    check(settings, sources)

    def evaluated(student: Path, output: Path) -> dict[str, Any]:
        encoders = [f"{STUDENT}={student}", *settings.encoders]
        own = dataclasses.replace(settings, encoders=encoders, output=output, cache=settings.embeddings)
        summary = run_once(own, {**sources, STUDENT: str(student)})
        if settings.cache is None:  # each checkpoint is evaluated once, and there are many
            shutil.rmtree(settings.embeddings / STUDENT, ignore_errors=True)
        return summary

    watch(settings.watch, settings.output, evaluated, settings.poll_seconds, settings.quiet)


def run_once(settings: EvalSettings, sources: dict[str, str]) -> dict[str, Any]:
    """One evaluation into one folder."""
    summary = evaluate(settings, sources)
    summary |= {"settings": resolved(settings), "versions": versions()}
    save_settings(settings, settings.output / "settings.yaml")
    write_json(settings.output / "repro.lock", lock_of(summary))
    write_json(settings.output / "summary.json", summary)
    print_summary(summary)
    page = settings.output / "report.html"
    write_report(ReportSettings(settings.output, settings.pairs, page))
    print(f"\nreport: {page}")
    return summary


def print_summary(summary: dict[str, Any]) -> None:
    """The primary metric of every row on every task, and accuracy beside balanced accuracy."""
    for name, task in summary["tasks"].items():
        units = next(iter(task["units"].values()))
        chance = task["chance"].get(task["primary_metric"])
        print(
            f"\n{name}: {task['primary_metric']}, {units['n']} samples in {units['groups']} groups"
            + (f", chance {chance:.3f}" if chance is not None else "")
        )
        width = max(map(len, task["rows"]))
        for row, result in task["rows"].items():
            metric = result["metrics"].get(task["primary_metric"])
            beside = [own for own in ("balanced_accuracy", "accuracy") if own != task["primary_metric"]]
            others = {own.replace("_", " "): result["metrics"].get(own) for own in beside}
            more = "".join(f"  {name} {as_text(own)}" for name, own in others.items() if own)
            print(f"  {row:<{width}}  {as_text(metric) + more if metric else result['undefined']}")
        for own in task["units"].values():
            if own.get("pooled"):
                print(f"  classes with a single group are resampled together: {', '.join(own['pooled'])}")
    block = summary["means"]["all"]["overall"]
    print(f"\nmean of {block['n']} tasks that every encoder has")
    width = max(map(len, block["rows"]), default=0)
    for row, metric in block["rows"].items():
        relative = block["above_chance"].get(row)
        print(
            f"  {row:<{width}}  {as_text(metric)}" + (f"  relative to chance {as_text(relative)}" if relative else "")
        )
    for name, encoder in summary["encoders"].items():
        for failure in encoder["failures"]:
            print(f"\n{name}: {failure}")
    for name, reason in {**summary["skipped"], **summary["skipped_datasets"]}.items():
        print(f"\n{name}: left out, {reason}")
    if summary["unreadable"]:
        print(f"\n{len(summary['unreadable'])} images could not be read and are left out")


if __name__ == "__main__":
    run(EvalSettings, main)
