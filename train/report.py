"""One self-contained HTML page from an evaluation and what the stages before it wrote; `mmkd eval` writes it, too."""

from __future__ import annotations

from mmkd.command.settings import check_arguments, run
from mmkd.evaluation.settings import ReportSettings

if __name__ == "__main__":
    check_arguments(ReportSettings)  # before the imports that take seconds

from mmkd.evaluation.report.page import write_report
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
    write_report(settings)
    if not settings.quiet:
        print(f"{settings.output}: {settings.output.stat().st_size / 1024:.0f} KiB, opens in any browser")


if __name__ == "__main__":
    run(ReportSettings, main)
