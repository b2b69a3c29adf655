"""One self-contained HTML page from an evaluation and what the stages before it left.

Of an evaluation on datasets it is a leaderboard, which `mmkd eval` writes by itself, too, and comes with Markdown.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmkd.command.settings import run, setting
from mmkd.evaluation.report.page import is_suite, write_leaderboard
from mmkd.evaluation.report.pairs_page import ReportInputs, build_report, read_summary
from mmkd.files import atomic_write_text, refuse_existing


@dataclass
class ReportSettings:
    """Write the report; logs and reports of stages that are not given or not there are left out of it."""

    results: Path = setting(help="folder that `mmkd eval` wrote")
    pairs: Path | None = setting(None, "folder of the pairs evaluated on, for the example images; not of datasets")
    output: Path = setting(Path("report.html"), "the page; of datasets, Markdown is written beside it")
    stage1_log: Path | None = setting(None, "log.jsonl of the pretraining; settings are read beside it")
    distill_log: Path | None = setting(None, "log.jsonl of the distillation; settings are read beside it")
    screen_report: Path | None = setting(None, "report.json of the screening")
    align_report: Path | None = setting(None, "report.json of the alignment; settings are read beside it")
    stages: Path | None = setting(None, "stages.json of the pipeline, for the time each stage took")
    quiet: bool = setting(False, "do not print where the page is")
    overwrite: bool = setting(False, "replace OUTPUT")


def main(settings: ReportSettings) -> None:
    """Write the page.

    Raises:
        FileNotFoundError: results or pairs are not there.
        ValueError: a file is broken, or pairs are missing or too many.
        FileExistsError: OUTPUT exists.
    """
    refuse_existing(settings.output, settings.overwrite)
    inputs = ReportInputs(
        settings.results,
        settings.pairs,
        settings.stage1_log,
        settings.distill_log,
        settings.screen_report,
        settings.align_report,
        settings.stages,
    )
    if is_suite(read_summary(settings.results)):
        refuse_existing(settings.output.with_suffix(".md"), settings.overwrite)
        write_leaderboard(inputs, settings.output)
    else:
        atomic_write_text(settings.output, build_report(inputs))
    if not settings.quiet:
        print(f"{settings.output}: {settings.output.stat().st_size / 1024:.0f} KiB, opens in any browser")


if __name__ == "__main__":
    run(ReportSettings, main)
