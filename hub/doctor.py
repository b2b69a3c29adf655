"""Look at this installation and machine: what will not work, and why.

    mmkd doctor
    mmkd doctor --device cuda --json

Exit code 0 when everything that was asked for works (warnings are about parts that may not be needed), 1 when the
package or the device that was named will not.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from mmkd.installation import Finding, examine
from mmkd.settings import run, setting

MARKS = {"ok": "  ok      ", "warning": "  WARNING ", "problem": "  PROBLEM "}


@dataclass
class DoctorSettings:
    """Look at versions, devices, memory, disk, cache and the Hub, and say what will not work."""

    device: str = setting("auto", "that is meant to be used: cpu, cuda ...; one that is not there is a problem")
    hub: bool = setting(True, "ask the Hub, whether it answers and which teachers it lets this token have")
    json: bool = setting(False, "as JSON, for other programs")


def main(settings: DoctorSettings) -> None:
    """Print the findings.

    Raises:
        SystemExit: 1 when there is a problem.
    """
    findings = examine(settings.device, settings.hub)
    counts = {status: sum(finding.status == status for finding in findings) for status in MARKS}
    if settings.json:
        print(json.dumps({**counts, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    else:
        print("\n".join(map(shown, findings)))
        print(f"\n{counts['problem']} problems, {counts['warning']} warnings")
    if counts["problem"]:
        raise SystemExit(1)


def shown(finding: Finding) -> str:
    """A finding on one line, and on a second one what it breaks."""
    line = f"{MARKS[finding.status]}{finding.part}: {finding.seen}"
    return f"{line}\n            {finding.breaks}" if finding.breaks else line


if __name__ == "__main__":
    run(DoctorSettings, main)
