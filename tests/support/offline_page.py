"""The page ``docs/results/offline.md``: the figures of ``offline.json`` as tables, one for each kind of task."""

from collections.abc import Iterable, Sequence
from typing import Any

HEAD = """# A run over small real data

<!-- written by: python tests/support/offline_results.py WORK -->

Results on six small classification datasets, MedPix, VQA-RAD, the classification of modalities, and clinical tables of
TCGA. They test the evaluation and are **not clinical results**: `{student}` is the student, and the
teachers are the three specialists, that `mmkd quickstart` trains in minutes from 521 packaged images. *Ensemble* is
the three teachers with equal weights.

Beside them stand two encoders whose results are known before
(`tests/support/known_encoders.py`): `random` gives every image and every text a direction
of its own and has to be at chance; `told` reads the right answer from the pixels and has to be near one.
Whether they do is the first table.

Brackets are 95 % intervals of {replicates:,} bootstrap replicates, groups drawn within classes, seed {seed}.
*Difference* is student less ensemble, paired. All figures, every teacher and metric of them too, are in
[offline.json](offline.json).

## Commands

`python tests/support/offline_results.py WORK` runs these in the folder WORK and writes this page. `$DATA` is
`shared/data`, also as `MMKD_DATA`; `$TESTS` is `tests/support`, also as `PYTHONPATH`.

```bash
{commands}
```
"""
SHORT = {"immunohistochemistry-ultrasound": "ihc-ultrasound", "fundus-photography-ct": "fundus-ct"}
HEADS = {"": "frozen", "meter": "co-attention", "zeroshot": "none (statements)"}
SURVIVAL = {
    "": "mean tile, Cox",
    "mil-cox": "attention, Cox",
    "mil-nll": "attention, hazards",
    "clinical": "age and sex, Cox",
}


def page(found: dict[str, Any], commands: Sequence[str]) -> str:
    """The whole page."""
    head = HEAD.format(commands="\n".join(commands), **{key: found[key] for key in ("student", "replicates", "seed")})
    parts = [head, known(found), covered(found), images(found, "zeroshot"), images(found, "probe"), curves(found)]
    return "\n".join([*parts, retrieval(found), questions(found), clinical(found), simulated(found)])


def known(found: dict[str, Any]) -> str:
    """Verdicts, failures printed as such."""
    lines, missed, judged = [], [], 0
    for name, own in sorted(found["verdicts"].items()):
        at_chance, near_one = own.get("random_at_chance"), own.get("told_near_one")
        if at_chance is None and near_one is None:
            continue
        judged += at_chance is not None
        missed += [name] if at_chance is False else []
        told = _number(own["told"]["value"]) if own["told"] else "-"
        answers = [{True: "yes", False: "**NO**", None: "-"}[answer] for answer in (at_chance, near_one)]
        lines.append([name, own["metric"], _number(own["chance"]), _cell(own["random"]), answers[0], told, answers[1]])
    failed = [name for name, own in found["verdicts"].items() if own.get("told_near_one") is False]
    verdict = (
        f"The interval of `random` holds chance on {judged - len(missed)} of {judged} tasks"
        + (f", not on {', '.join(missed)}" if missed else "")
        + f"; of {judged} intervals of 95 % about {judged * 0.05:.1f} may miss. "
        + (f"`told` is **not** near one on {', '.join(failed)}." if failed else "`told` is near one on every task.")
    )
    note = """
Near one is .95 or more. For heads that are trained on answers the rule differs: chance is what the question alone
gives, so that `random` has to gain nothing from the image (accuracy less that of the question alone, paired);
and `told` needs .9 of *closed* questions, since most open answers occur once or never in training, where no head can
learn them. In the simulated cohorts `random` is bags of noise, `told` bags that show the time of death, and the
covariates are uninformative as well.
"""
    header = ["task", "metric", "chance", "random", "at chance", "told", "near one"]
    return f"## Do the numbers move the right way?\n\n{verdict}\n{note}\n{_table(header, lines)}"


def covered(found: dict[str, Any]) -> str:
    """How many of many random encoders have an interval that holds chance."""
    lines = []
    for task in _tasks(found, "zeroshot"):
        own = found["coverage"][task["dataset"]]
        about = [task["dataset"], f"{task['n']:,}", _number(task["chance"][task["primary_metric"]])]
        lines.append(
            [*about, f"{_number(own['mean'])} ± {_number(own['error'])}", f"{own['held']} of {found['draws']}"]
        )
    note = f"""
One random encoder is one draw. Zero-shot classification by {found["draws"]} others, mean and its standard error, and
how many intervals hold chance. Where a class has a handful of test images (OCT six in all, covid-cxr four of `other`,
nuclei-stain four of `brightfield`, `modality` one of OCT) a bootstrap cannot know how much they vary, and intervals are
too narrow.
"""
    return f"{note}\n{_table(['dataset', 'test', 'chance', 'mean', 'chance held'], lines)}"


def images(found: dict[str, Any], kind: str) -> str:
    """Zero-shot classification or probes of all encoders."""
    lines = []
    for task in _tasks(found, kind):
        if task["variant"] != "shots":
            about = (
                [task["dataset"], f"{task['n']:,}"]
                if kind == "zeroshot"
                else [task["dataset"], f"{task['train']:,}", f"{task['n']:,}", task["search"]]
            )
            lines.append(
                [*about, _number(task["chance"][task["primary_metric"]]), *_rows(found, task, task["primary_metric"])]
            )
    if kind == "zeroshot":
        title = "## Zero-shot classification: balanced accuracy\n"
        about = ["dataset", "test"]
        note = """
OCT is six example images of four classes: this only checks that the task runs. `modality` is the classification of the
images of ten folders into nine modalities, in splits assigned by patient, case or lesion; VQA-RAD and the official
examples are left out, whose tables do not state the modality (VQA-RAD has "X-ray/CT/MR" for each) or hold one image of
each.
"""
    else:
        title = "## Linear probes: balanced accuracy\n"
        about = ["dataset", "training", "test", "C by"]
        note = """
Images before the projection; C from a sweep of 13 fits on the validation images. OCT has no training images. The
class OCT of `modality` has four, and one to test on.
"""
    return f"\n{title}{note}\n{_table([*about, 'chance', *_names(found)], lines)}"


def curves(found: dict[str, Any]) -> str:
    """Few shots of the student and the ensemble."""
    tasks = [task for task in _tasks(found, "probe") if task["variant"] == "shots"]
    settings = ["1-shot", "2-shot", "4-shot", "8-shot", "16-shot", "32-shot", "10%", "100%"]
    lines = [
        [
            task["dataset"],
            row,
            *(_optional(task["rows"][row].get(f"balanced_accuracy@{setting}")) for setting in settings),
        ]
        for task in tasks
        for row in (found["student"], "ensemble")
    ]
    note = """
### With few training images

Mean over five seeds. A class with too few training images has no column; `100%` has the fixed C of the fast mode, not
the sweep's.
"""
    return f"{note}\n{_table(['dataset', '', *settings], lines)}"


def retrieval(found: dict[str, Any]) -> str:
    """Both directions over MedPix's test cases and over all of it."""
    lines = []
    for task in _tasks(found, "retrieval"):
        pool = f"{task['pool']['images']:,} images, {task['pool']['captions']:,} captions"
        for metric in ["mean_recall", *(m for m in task["rows"][found["student"]] if m != "mean_recall")]:
            name = metric.replace("_", " ").replace("recall", "R").replace("mean R", "mean of R@1, 5, 10")
            if task["chance"].get(metric) == 1:
                continue
            chance = _number(task["chance"][metric]) if metric in task["chance"] else "-"
            lines.append([pool if metric == "mean_recall" else "", name, chance, *_rows(found, task, metric)])
    note = """
## Retrieval: MedPix

`medpix2` is the official case-level split: its test images against their captions. `medpix2-all` takes all 2,050
images. Equal captions are one and right for all their images; equal images are one and right for all their captions.
MedPix holds 1,363 captions as strings. Eleven of these repeat another but for white space, which tokenizers read as
the same sentence, so the pool holds **1,352**. R@k that is one for every order is left out.
"""
    return f"{note}\n{_table(['pool', 'metric', 'chance', *_names(found)], lines)}"


def questions(found: dict[str, Any]) -> str:
    """Every head on every split, with its controls."""
    metrics = (
        "accuracy",
        "closed_accuracy",
        "open_accuracy",
        "question_only_accuracy",
        "shuffled_image_accuracy",
        "gain",
    )
    lines = []
    for task in _tasks(found, "vqa"):
        head = HEADS[task["variant"].removesuffix("disjoint").strip("-")]
        split = "by image" if "disjoint" in task["variant"] else "official"
        for place, row in enumerate((found["student"], "random", "told")):
            cells = task["rows"][row]
            about = [f"{head}, {split}, {task['n']}"] if place == 0 else [""]
            lines.append([*about, row, *(_optional(cells.get(metric)) for metric in metrics)])
    official = next(task for task in _tasks(found, "vqa") if not task["variant"])
    disjoint = next(task for task in _tasks(found, "vqa") if task["variant"] == "disjoint")
    note = f"""
## Questions: VQA-RAD

The official split has {official["shared_images"]} test images that also have training questions; the
split by image has {disjoint["shared_images"] or "none"}.
{official["unanswerable"]:.1%} and {disjoint["unanswerable"]:.1%}
of the test answers occur in no training or validation question and cannot be given. The guess of the commonest
training answer is right in {_number(official["chance"]["accuracy"])} and {_number(disjoint["chance"]["accuracy"])}.
Co-attention takes minutes for each encoder, so that the teachers are left out here.
*Gain* is accuracy less that of the question alone, paired: where its interval contains zero, no use of the image is
shown. The head without training answers closed questions only, by statements; its "question only" is the mean of all
test images.
"""
    header = ["head, split, questions", "", "accuracy", "closed", "open", "question only", "shuffled image", "gain"]
    return f"{note}\n{_table(header, lines)}"


def clinical(found: dict[str, Any]) -> str:
    """Covariates of the real tables."""
    lines = []
    for name, task in found["tasks"].items():
        if name.endswith("clinical-clinical"):
            cells = task["rows"][found["student"]]
            about = [task["dataset"].removesuffix("-clinical"), str(task["n"]), str(task["event"])]
            both = [_cell(cells[metric]) for metric in ("c_index", "c_index_uno")]
            lines.append([*about, ", ".join(task["covariates"]), *both, f"{task['scikit-survival']:.4f}"[1:]])
    note = """
## Survival: clinical tables of TCGA

Tables without slides: Cox on their own covariates, out of fold, the same for every encoder. Folds keep all cases of a
site together. The last column is scikit-survival's Cox model on the same covariates and folds with the same ridge.
"""
    header = ["cohort", "cases", "deaths", "covariates", "Harrell C", "Uno C", "scikit-survival, Harrell C"]
    return f"{note}\n{_table(header, lines)}"


def simulated(found: dict[str, Any]) -> str:
    """Bags of a known hazard on the cases of real tables."""
    lines = []
    for name, task in found["tasks"].items():
        if name.startswith("survival-simulated"):
            about = [task["dataset"].removeprefix("simulated-"), str(task["n"]), str(task["event"])]
            rows = [_cell(task["rows"][row]["c_index"]) for row in ("hazard", "noise", "told")]
            lines.append([*about, SURVIVAL[task["variant"]], *rows, _number(task["true_hazard"])])
    note = """
## Survival: simulated deaths on TCGA's cases

**These test the protocol and are no result.** Cases, slides, age and sex are those of the tables; bags and deaths are
simulated (`tests/support/simulate_cohort.py`). The tables' own deaths have no hazard that is known, so times
of death are drawn from one, exponential of rate `c exp(1.5 z)` with z from N(0, 1); censoring is drawn from the
table's own, and c is such that as many die. Bags show z (`hazard`), the time of death (`told`) or nothing (`noise`)
in a third of their tiles. The last column is the concordance of z itself, which no model can be expected to exceed.
Harrell's C.
"""
    header = ["cohort", "cases", "deaths", "model", "hazard", "noise", "told", "z itself"]
    return f"{note}\n{_table(header, lines)}"


def _tasks(found: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [task for task in found["tasks"].values() if task["kind"] == kind]


def _names(found: dict[str, Any]) -> list[str]:
    return [found["student"], *(SHORT.get(name, name) for name in found["teachers"]), "ensemble", "difference"]


def _rows(found: dict[str, Any], task: dict[str, Any], metric: str) -> list[str]:
    """Student, teachers, ensemble, and the paired difference where the metric is the primary metric."""
    rows = [_cell(task["rows"][row][metric]) for row in (found["student"], *found["teachers"], "ensemble")]
    paired = task["differences"]["ensemble"]
    return [*rows, _cell({**paired, "value": paired["difference"]}) if metric == task["primary_metric"] else ""]


def _optional(metric: dict[str, Any] | None) -> str:
    return "-" if metric is None or metric["value"] is None else _cell(metric)


def _cell(metric: dict[str, Any]) -> str:
    value, low, high = (_number(metric[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _number(value: float | None) -> str:
    """Three digits without the zero before the point; one where there is much before it."""
    if value is None:
        return "-"
    shown = f"{value:.3f}" if abs(value) < 2 else f"{value:,.1f}"
    return shown.replace("0.", ".", 1) if shown.lstrip("-").startswith("0.") else shown


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
