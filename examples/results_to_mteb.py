"""Write the results of `mmkd eval` into a result cache of mteb, one file for each encoder and task.

    pip install mteb
    python examples/results_to_mteb.py results mteb-cache

`mteb.ResultCache("mteb-cache").load_results()` reads them back. Intervals stay in `summary.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mteb
from mteb.models import ModelMeta
from mteb.results import TaskResult


def main(results: Path, cache: mteb.ResultCache) -> None:
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    for encoder, record in summary["encoders"].items():
        name = encoder if "/" in encoder else f"local/{encoder}"
        model = ModelMeta.create_empty({"name": name, "revision": record["fingerprint"]})
        for task_name, task in summary["tasks"].items():
            metrics = task["rows"].get(encoder, {}).get("metrics") or {}
            if not metrics:  # not evaluated on this task
                continue
            scores: dict[str, Any] = {metric: found["value"] for metric, found in metrics.items()}
            scores |= {"main_score": scores[task["primary_metric"]], "hf_subset": "default", "languages": ["eng-Latn"]}
            result = TaskResult(
                task_name=task_name,
                dataset_revision=summary["datasets"][task["dataset"]]["manifest_sha256"],
                mteb_version=mteb.__version__,
                scores={summary["settings"]["split"]: [scores]},
                evaluation_time=None,
            )
            cache.save_to_cache(result, model)


if __name__ == "__main__":
    main(Path(sys.argv[1]), mteb.ResultCache(sys.argv[2]))
