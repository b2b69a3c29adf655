"""One self-contained HTML page from an evaluation and what the stages before it wrote; `mmkd eval` writes it, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class ReportSettings:
    """Write the report; sections of logs and reports that are not given, or do not exist, are left out.

    Example:
        mmkd report --results results --pairs pairs --output report.html
    """

    results: Path = setting(help="folder written by `mmkd eval`")
    pairs: Path | None = setting(None, "folder of the evaluated pairs, for example images")
    output: Path = setting(Path("report.html"), "the page; Markdown is written beside it")
    stage1_log: Path | None = setting(None, "log.jsonl of the pretraining; settings are read beside it")
    distill_log: Path | None = setting(None, "log.jsonl of the distillation; settings are read beside it")
    choice: Path | None = setting(None, "choice.json of `mmkd merge --pairs`: what the student is made of")
    screen_report: Path | None = setting(None, "report.json of the screening")
    align_report: Path | None = setting(None, "report.json of the alignment; settings are read beside it")
    stages: Path | None = setting(None, "stages.json of the pipeline, for the time each stage took")
    quiet: bool = setting(False, "do not print the location of the page")
    overwrite: bool = setting(False, "replace OUTPUT")


if __name__ == "__main__":
    check_arguments(ReportSettings)  # before the imports that take seconds

from mmkd.evaluation.report.page import ReportInputs, write_report
from mmkd.files import refuse_existing


def main(settings: ReportSettings) -> None:
    """Write the page and its Markdown.

    Raises:
        FileNotFoundError: results or pairs do not exist.
        ValueError: a file is broken.
        FileExistsError: OUTPUT exists.
    """
    refuse_existing(settings.output, settings.overwrite)
    refuse_existing(settings.output.with_suffix(".md"), settings.overwrite)
    inputs = ReportInputs(
        settings.results,
        settings.pairs,
        settings.stage1_log,
        settings.distill_log,
        settings.choice,
        settings.screen_report,
        settings.align_report,
        settings.stages,
    )
    write_report(inputs, settings.output)
    if not settings.quiet:
        print(f"{settings.output}: {settings.output.stat().st_size / 1024:.0f} KiB, opens in any browser")


if __name__ == "__main__":
    run(ReportSettings, main, lambda settings: [settings.output])
