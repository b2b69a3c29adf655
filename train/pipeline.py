"""The whole way from one YAML: curate, pretrain, teachers, extract, screen, align, distill, evaluate, report.

Every stage is the command a user would type, started as its own process and printed before it runs; the pipeline adds
only the order, the folder names and, when no teachers are named, a partition of the pairs among small specialists
fine-tuned on the spot. Started again, it skips what has finished and goes on where it was killed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmkd.data.partition import partition
from mmkd.data.records import open_pairs
from mmkd.files import atomic_write_text, read_json, refuse_existing, write_json
from mmkd.settings import run, setting

SEEDED = ("curate", "pretrain", "align", "distill", "eval")


@dataclass
class PipelineSettings:
    """The whole way from images to a distilled student and a report.

    Each stage's own settings go under its name: `--distill.epochs 4`.
    """

    output: Path = setting(Path("mmkd-clip"), "folder of the student, for AutoModel.from_pretrained")
    report: Path = setting(Path("report.html"), "the page that shows student, teachers and examples")
    work: Path = setting(Path("mmkd-clip-work"), "folder for everything between: pairs, teachers, features, results")
    data: Path | None = setting(None, "folder with a labels.csv; without it, images that came with PyPI packages")
    teachers: list[str] = setting(factory=list, help="teachers by name or folder; none = specialists trained here")
    specialists: int = setting(3, "how many specialists are trained when no teachers are named")
    seed: int = setting(42, "seed of every stage")
    quiet: bool = setting(False, "no progress bars")
    overwrite: bool = setting(False, "replace OUTPUT and REPORT even if this pipeline did not make them")
    curate: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    pretrain: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    specialist: dict[str, Any] = setting(factory=dict, help="settings of each specialist's training, a pretraining")
    extract: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    screen: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    align: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    distill: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    eval: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")


def main(settings: PipelineSettings) -> None:
    """Run every stage that has not finished yet.

    Raises:
        FileNotFoundError: the folder of images does not exist.
        FileExistsError: OUTPUT exists and was not made by this pipeline.
        ValueError: a stage failed; its own message stands above.
    """
    started = time.monotonic()
    work, stages = settings.work, Stages(settings)
    pairs, features, aligned = work / "pairs", work / "features", work / "aligned"
    source = str(settings.data) if settings.data else "packaged"
    stages.run("curate", "curate", pairs, {"source": source, **settings.curate})
    stages.run("pretrain", "pretrain", work / "stage1", {"pairs": str(pairs), **settings.pretrain})
    teachers = settings.teachers or train_specialists(stages, settings, pairs)
    stages.run("extract", "extract", features, {"teacher": teachers, "pairs": str(pairs), **settings.extract})
    inputs = {"pairs": str(pairs), "features": str(features)}
    stages.run("screen", "screen", work / "screened", {**inputs, **settings.screen})
    inputs["pairs"] = str(work / "screened")
    stages.run("align", "align", aligned, {**inputs, **settings.align})
    inputs |= {"aligned": str(aligned), "model": str(work / "stage1")}
    stages.run("distill", "distill", settings.output, {**inputs, **settings.distill})
    encoders = [f"student={settings.output}", *teachers, f"stage1={work / 'stage1'}"]
    stages.run("eval", "eval", work / "results", {"encoders": encoders, "pairs": str(pairs), **settings.eval})
    stages.run("report", "report", settings.report, report_inputs(settings, stages))
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nDone in {minutes} min {seconds:02d} s. Student: {settings.output}/  Report: {settings.report}")


def train_specialists(stages: Stages, settings: PipelineSettings, pairs: Path) -> list[str]:
    """Train one small teacher on each share of the training pairs; returns their folders."""
    shares = partition(open_pairs(pairs, "train").pairs, settings.specialists)
    folders = []
    for number, (name, selection) in enumerate(shares.items()):
        folder = settings.work / "teachers" / name
        values = {"pairs": str(pairs), **selection, **settings.specialist, "seed": settings.seed + 1 + number}
        stages.run("pretrain", f"teacher {name}", folder, values)
        folders.append(str(folder))
    return folders


def report_inputs(settings: PipelineSettings, stages: Stages) -> dict[str, Any]:
    """Where the report finds what the stages left."""
    work = settings.work
    return {
        "results": str(work / "results"),
        "pairs": str(work / "pairs"),
        "stage1_log": str(work / "stage1" / "log.jsonl"),
        "distill_log": str(settings.output / "log.jsonl"),
        "screen_report": str(work / "screened" / "report.json"),
        "align_report": str(work / "aligned" / "report.json"),
        "stages": str(stages.record),
    }


class Stages:
    """Runs each stage once: what finished stands in WORK/stages.json, under a hash of all settings up to there."""

    def __init__(self, settings: PipelineSettings):
        self.settings = settings
        self.record = settings.work / "stages.json"
        self.known: dict[str, dict[str, Any]] = read_json(self.record) if self.record.is_file() else {}
        self.total = 8 + (0 if settings.teachers else settings.specialists)
        self.number = 0
        if not self.known:
            refuse_existing(settings.work, settings.overwrite)
        self.chain = _source_hash(settings.data)
        for name, path in (("distill", settings.output), ("report", settings.report)):
            if self.known.get(name, {}).get("output") != str(path):
                refuse_existing(path, settings.overwrite)

    def run(self, recipe: str, name: str, output: Path, values: dict[str, Any]) -> None:
        """Write the stage's settings as YAML and start ``mmkd RECIPE --config`` on it, unless it finished before."""
        self.number += 1
        if recipe in SEEDED:
            values = {"seed": self.settings.seed, **values}
        values = {"output": str(output), **values}
        self.chain = hashlib.sha256((self.chain + yaml.safe_dump(values)).encode()).hexdigest()
        heading = f"[{self.number}/{self.total}] {name}"
        before = self.known.get(name, {})
        if before.get("hash") == self.chain and before.get("seconds") is not None and output.exists():
            print(f"{heading}: done before", flush=True)
            return
        if before.get("hash") != self.chain:
            _remove(output)
        self._remember(name, {"hash": self.chain, "output": str(output), "seconds": None})
        config = self.settings.work / "configs" / f"{name.replace(' ', '-')}.yaml"
        atomic_write_text(config, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        print(f"\n{heading}: mmkd {recipe} --config {config}", flush=True)
        started = time.monotonic()
        switches = ["--quiet"] if self.settings.quiet else []
        code = subprocess.call([sys.executable, "-m", "mmkd.cli", recipe, "--config", str(config), *switches])
        if code != 0:
            raise ValueError(f"stage {name} failed (exit code {code}); mend it and start the same command again")
        seconds = round(time.monotonic() - started, 1)
        self._remember(name, {"hash": self.chain, "output": str(output), "seconds": seconds})

    def _remember(self, name: str, entry: dict[str, Any]) -> None:
        self.known[name] = entry
        write_json(self.record, self.known)


def _remove(output: Path) -> None:
    """Take away what an earlier run with other settings left."""
    for path in (output, output.with_name(output.name + ".partial")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _source_hash(data: Path | None) -> str:
    """Changes when the user's table changes."""
    if data is None:
        return "packaged"
    if not data.is_dir():
        raise FileNotFoundError(f"--data {data}: no such folder; it should hold a labels.csv and the images it names")
    tables = [data / name for name in ("labels.csv", "meta.jsonl") if (data / name).is_file()]
    return str(data.resolve()) + "".join(hashlib.sha256(table.read_bytes()).hexdigest() for table in tables)


if __name__ == "__main__":
    run(PipelineSettings, main)
