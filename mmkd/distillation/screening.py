"""Teacher agreement on a pair: a teacher's own image-text similarity against its similarities of mismatched pairs.

The paper's rule is unpublished, except that kept pairs match their own caption best among their batch, and that a
sample stays when at least five of nine teachers agree. Comparing within one teacher only, by rank, makes teachers
comparable whose similarities lie on different scales (0.08 for one, 0.5 for another). Mismatches come from pools of
random pairs, one for each split and modality, drawn once, so that any number of pairs can be screened in a stream.

An image and a caption are mismatched only if they differ in meaning (`Meanings`). Captions of one class in other words
would otherwise outnumber the mismatches, and a teacher that recognizes every class without error would fail. Within a
modality, a pair is compared with mismatches of its own modality: among all modalities, a teacher that recognizes
nothing but the modality would pass. The report's counts add up, and it shows each teacher's similarities.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmkd.command.tasks import Progress
from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.folder import CHUNK, PairFolder, chosen_rows, open_pairs
from mmkd.data.table import SPLITS, UNKNOWN, Pair, in_columns, map_table, take_rows, write_table
from mmkd.pages.charts import histograms
from mmkd.pages.page import Grid, Page, Section, Table, number

Rule = Literal["percentile", "rank", "all"]

WORD = re.compile(r"\w+")
ALIKE = 0.8  # share of common words from which two captions say the same
INDIVIDUAL = 0.5  # share of distinct captions from which the captions of a single label say more than it does


Class = tuple[str, str]  # modality and label
Labels = dict[str, dict[tuple[str, ...], str]]  # modality -> words of a label -> the label


@dataclass(frozen=True)
class Meanings:
    """What n pairs are about, as far as it can be compared: their class, or the words of their captions.

    Attributes:
        shown: class of each image, where the label decides, else None.
        named: class that each caption names; that of the image where it names none or several.
        words: distinct words of each caption.
    """

    shown: Sequence[Class | None]
    named: Sequence[Class | None]
    words: Sequence[frozenset[str]]

    @classmethod
    def of(cls, pairs: Sequence[Pair], labels: Labels) -> Meanings:
        """The meanings of pairs, by label in the modalities of `labels`; see `deciding_labels`."""
        shown: list[Class | None] = []
        named: list[Class | None] = []
        sentences = [words_of(pair.caption) for pair in pairs]
        for pair, sentence in zip(pairs, sentences, strict=True):
            own = (pair.modality, pair.label) if pair.label and pair.modality in labels else None
            shown.append(own)
            label = named_label(sentence, labels[pair.modality]) if own else None
            named.append((pair.modality, label) if label else own)
        return cls(shown, named, [frozenset(sentence) for sentence in sentences])

    def __len__(self) -> int:
        return len(self.words)

    def differ(self, captions: Meanings) -> Tensor:
        """Which of these n images differ in meaning from which of m captions, (n, m) bool.

        An image and a caption of known classes differ if these are not the same. Others differ if the image's own
        caption shares less than 80 % of the words with the other (intersection over union).
        """
        numbers: dict[str, int] = {}
        for word in (word for own in (self.words, captions.words) for caption in own for word in caption):
            numbers.setdefault(word, len(numbers))
        common = torch.sparse.mm(_incidence(self.words, numbers), _incidence(captions.words, numbers).to_dense().T)
        lengths, other_lengths = (torch.tensor([len(own) for own in each]) for each in (self.words, captions.words))
        by_words = common < ALIKE * (lengths[:, None] + other_lengths[None, :] - common)
        known: dict[Class | None, int] = {None: -1}
        shown, named = (
            torch.tensor([known.setdefault(name, len(known)) for name in own], dtype=torch.long)
            for own in (self.shown, captions.named)
        )
        by_class = (shown[:, None] >= 0) & (named[None, :] >= 0)
        return torch.where(by_class, shown[:, None] != named[None, :], by_words)


def words_of(text: str) -> tuple[str, ...]:
    """The words and numbers of a text in their order, in lower case."""
    return tuple(WORD.findall(text.lower()))


def named_label(sentence: tuple[str, ...], labels: dict[tuple[str, ...], str]) -> str | None:
    """The label whose words stand in a sentence in their order; of several the longest, None where two are as long."""
    for length in sorted({len(words) for words in labels}, reverse=True):
        parts = {sentence[start : start + length] for start in range(len(sentence) - length + 1)}
        found = [label for words, label in labels.items() if words in parts]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def deciding_labels(pairs: Iterable[Pair]) -> Labels:
    """The labels of the modalities in which the label tells what an image shows.

    That is where there are two labels or more. A single one says nothing, unless most of its captions are repeated:
    then they only put the label into a sentence.
    """
    captions: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    labels: Labels = defaultdict(dict)
    for pair in pairs:
        if pair.label:
            labels[pair.modality][words_of(pair.label)] = pair.label
            captions[pair.modality].append(words_of(pair.caption))
    return {
        modality: own
        for modality, own in labels.items()
        if len(own) > 1 or len(set(captions[modality])) <= INDIVIDUAL * len(captions[modality])
    }


def _incidence(words: Sequence[frozenset[str]], numbers: dict[str, int]) -> Tensor:
    """Which words each caption has, sparse (captions, words) float32."""
    places = [(row, numbers[word]) for row, own in enumerate(words) for word in own]
    indices = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T
    return torch.sparse_coo_tensor(indices, torch.ones(len(places)), (len(words), len(numbers)), check_invariants=False)


@dataclass(frozen=True)
class Pool:
    """One teacher's features of random pairs.

    Attributes:
        meanings: of the m pairs.
        image: (m, dim) features, unit length.
        text: (m, dim) features, unit length.
        labels: by which meanings were found; see `deciding_labels`.
    """

    meanings: Meanings
    image: Tensor
    text: Tensor
    labels: Labels = field(default_factory=dict)

    def mismatched(self) -> Tensor:
        """Similarities of images and captions that do not belong together, flat."""
        similarity = self.image @ self.text.T
        return similarity[self.meanings.differ(self.meanings)]

    def threshold(self, percentile: float) -> float:
        """The percentile of the mismatched similarities; minus infinity where there are none."""
        mismatched = self.mismatched()
        rank = math.ceil(percentile / 100 * len(mismatched))
        return -math.inf if rank == 0 else float(mismatched.kthvalue(rank).values)


def above(image: Tensor, text: Tensor, threshold: float) -> Tensor:
    """Whether the similarity of each of n pairs is above a threshold.

    With the ``p``-th percentile of mismatches, a random teacher passes ``100 - p`` percent of pairs.

    Args:
        image: (n, dim) image features, unit length.
        text: (n, dim) text features of the same pairs, unit length.
        threshold: see `Pool.threshold`.

    Returns:
        (n,) bool.
    """
    return (image * text).sum(dim=1) > threshold


def within_top(image: Tensor, text: Tensor, meanings: Meanings, pool: Pool, top: int) -> Tensor:
    """Whether each image's own caption ranks among its best ``top`` against the pool's captions of other meaning.

    Args:
        image: (n, dim) image features, unit length.
        text: (n, dim) text features of the same pairs, unit length.
        meanings: of the n pairs.
        pool: the other captions.
        top: 1 for the first place alone; a tie counts against the own caption.

    Returns:
        (n,) bool.
    """
    own = (image * text).sum(dim=1, keepdim=True)
    better = (image @ pool.text.T >= own) & meanings.differ(pool.meanings)
    return better.sum(dim=1) < top


def default_minimum(teachers: int) -> int:
    """How many teachers must agree: the paper's five of nine, and the same share of fewer."""
    return min(5, max(1, round(5 / 9 * teachers)))


KEPT, TOO_FEW, UNSEEN, OTHER_MODALITY = (
    "kept",
    "too few teachers agree",
    "no teacher has its features",
    "other modality",
)

BINS = np.linspace(-1, 1, 201)

BIN = 0.01

SHOWN_CLASSES = 40  # the largest ones, in the report

FEWEST_OF_CLASS, DEPLETED = 10, 0.5

COUNTS = b"counts"  # in the metadata of a file of `screen_runs`


class ScreeningReport:
    """Counts of pairs in a stream; its size grows with their labels, not with them."""

    def __init__(self, teachers: Sequence[str]) -> None:
        """Start at zero."""
        self.teachers = list(teachers)
        self.counts: Counter[tuple[str, ...]] = Counter()  # what is counted, and of what
        self.own = {name: np.zeros(len(BINS) - 1, dtype=np.int64) for name in teachers}

    def add(self, pair: Pair, available: Sequence[str], reason: str) -> None:
        """Count a pair: the teachers available for it, and whether it stays or why not."""
        if pair.split != "train":
            self.counts["held out",] += 1
            return
        modality = pair.modality or "unnamed"
        keys: list[tuple[str, ...]] = [("reason", reason), ("agreeing", str(len(available))), ("modality", modality)]
        keys += [("available", modality, name) for name in available]
        keys += [("class", modality, pair.label)] if pair.label else []
        if reason == KEPT:
            keys += [("kept", *key) for key in keys if key[0] in ("modality", "class")]
        self.counts.update(keys)

    def add_similarities(self, teacher: str, similarities: np.ndarray) -> None:
        """Count similarities (n,) of a teacher's own image-caption pairs."""
        self.own[teacher] += np.histogram(np.clip(similarities, -1, 1), BINS)[0]

    def to_json(self) -> str:
        """All counts, for `add_json`."""
        counts = [[*key, count] for key, count in self.counts.items()]
        return json.dumps({"counts": counts, "own": {name: bins.tolist() for name, bins in self.own.items()}})

    def add_json(self, text: bytes) -> None:
        """Add the counts of other pairs."""
        found = json.loads(text)
        self.counts.update({tuple(key): count for *key, count in found["counts"]})
        for name, bins in found["own"].items():
            self.own[name] += np.array(bins)

    def summary(self, minimum: int, pools: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Everything as JSON; training pairs = kept + dropped = sum of ``agreeing``, by modality and by teacher, too.

        Args:
            minimum: teachers that had to agree.
            pools: teacher -> ``pool`` (its size), ``threshold`` and ``mismatched`` (counts by bin) of its pool over all
                modalities, ``thresholds`` by modality.
        """
        dropped = {reason: self.counts["reason", reason] for reason in (TOO_FEW, UNSEEN, OTHER_MODALITY)}
        kept = self.counts["reason", KEPT]
        modalities: dict[str, dict[str, Any]] = {
            modality: {
                "pairs": count,
                "kept": self.counts["kept", "modality", modality],
                "available": {name: self.counts["available", modality, name] for name in self.teachers},
            }
            for (modality,), count in sorted(self._of("modality").items())
        }
        classes = [
            {"modality": own[0], "label": own[1], "pairs": count, "kept": self.counts["kept", "class", own[0], own[1]]}
            for own, count in sorted(self._of("class").items(), key=lambda item: (-item[1], item[0]))
        ]
        similarities = {
            name: {**pools[name], "own": histogram(self.own[name]), "mismatched": histogram(pools[name]["mismatched"])}
            for name in self.teachers
        }
        return {
            "minimum_teachers": minimum,
            "train": {"pairs": kept + sum(dropped.values()), "kept": kept, "dropped": dropped},
            "held_out_kept_unscreened": self.counts["held out",],
            "agreeing_teachers": {str(n): self.counts["agreeing", str(n)] for n in range(len(self.teachers) + 1)},
            "available": {name: sum(own["available"][name] for own in modalities.values()) for name in self.teachers},
            "modalities": modalities,
            "classes": classes[:SHOWN_CLASSES],
            "depleted_classes": depleted(classes),
            "similarities": similarities,
        }

    def _of(self, kind: str) -> dict[tuple[str, ...], int]:
        return {key[1:]: count for key, count in self.counts.items() if key[0] == kind}


def depleted(classes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The classes of at least ten pairs of which less than half as large a share is kept as of all others together.

    Args:
        classes: ``pairs`` and ``kept`` of each.
    """
    pairs, kept = (sum(own[key] for own in classes) for key in ("pairs", "kept"))
    found = []
    for own in classes:
        others, others_kept = pairs - own["pairs"], kept - own["kept"]
        if own["pairs"] >= FEWEST_OF_CLASS and others and own["kept"] * others < DEPLETED * own["pairs"] * others_kept:
            found.append(own)
    return found


def warnings_of(summary: dict[str, Any]) -> list[str]:
    """A sentence for each class that keeps far less than the others; see `depleted`."""
    train = summary["train"]
    return [
        f"Of {own['label']} ({own['modality']}), {own['kept']} of {own['pairs']} training pairs are kept "
        f"({own['kept'] / own['pairs']:.0%}; of all pairs {train['kept'] / train['pairs']:.0%}): the student will "
        "see little of this class. Lower --minimum_teachers or --percentile, or check its captions."
        for own in summary["depleted_classes"]
    ]


def histogram(counts: np.ndarray) -> dict[str, int]:
    """The bins that are not empty, by their lower edge."""
    return {f"{BINS[k]:.2f}": int(counts[k]) for k in np.flatnonzero(counts)}


def screening_page(summary: dict[str, Any]) -> Page:
    """The report as a page: what was kept, and each teacher's similarities of own and of mismatched captions."""
    train, teachers = summary["train"], list(summary["available"])
    charts = [
        histograms(
            f"{name}: {summary['available'][name]} of {train['pairs']} training pairs",
            {side: {float(edge): count for edge, count in about[side].items()} for side in ("mismatched", "own")},
            BIN,
            about["threshold"],
        )
        for name, about in summary["similarities"].items()
    ]
    agreeing = [[count, pairs] for count, pairs in summary["agreeing_teachers"].items()]
    modalities = [
        [name, own["pairs"], own["kept"], _share(own), *(own["available"][teacher] for teacher in teachers)]
        for name, own in summary["modalities"].items()
    ]
    classes = [[own["modality"], own["label"], own["pairs"], own["kept"], _share(own)] for own in summary["classes"]]
    thresholds = [
        [name, *(number(about["thresholds"].get(name)) for about in summary["similarities"].values())]
        for name in sorted({name for about in summary["similarities"].values() for name in about["thresholds"]})
    ]
    sections = [
        Section("similarities", "Image-text similarity of each teacher",
                "Own captions and mismatched ones, each as tall as its panel; the dashed line is the threshold.",
                [Grid(charts)]),
        Section("counts", "Counts of training pairs", "", [
            Table("Dropped", ["Reason", "pairs"], [[reason, count] for reason, count in train["dropped"].items()]),
            Table("Pairs by number of available teachers", ["Teachers", "pairs"], agreeing),
            Table("Available teachers by modality", ["Modality", "pairs", "kept", "share", *teachers], modalities),
            *([Table("Kept by class", ["Modality", "label", "pairs", "kept", "share"], classes)] if classes else []),
            *([Table("Thresholds by modality", ["Modality", *teachers], thresholds)] if thresholds else []),
        ]),
    ]  # fmt: skip
    title = f"Screening kept {train['kept']} of {train['pairs']} training pairs"
    claims = [
        f"A pair stays when at least {summary['minimum_teachers']} teachers agree with it.",
        f"{summary['held_out_kept_unscreened']} held-out pairs stay unscreened.",
        *warnings_of(summary),
    ]
    return Page(title, sections, claims, footer="Made by mmkd screen.")


def _share(own: dict[str, Any]) -> str:
    return f"{own['kept'] / own['pairs']:.0%}"


ALL = ""  # the pools of all modalities together

Pools = dict[str, dict[str, dict[str, Pool]]]  # split -> teacher -> modality, or `ALL` -> its pool

Drawn = dict[str, dict[str, np.ndarray]]  # split -> modality, or `ALL` -> positions of pairs, (m,)


def draw(
    pairs: Sequence[Pair], features: TeacherFeatures, size: int, seed: int, fewest: int | None
) -> tuple[Drawn, set[str]]:
    """For each split and modality random pairs that teachers have features of; and the modalities of all pairs.

    Every pair gets a random number, and those with the smallest ones are drawn: one pass, and the same pairs for all.

    Args:
        pairs: all of them.
        features: of all teachers.
        size: pairs of a pool.
        seed: of the draw.
        fewest: pairs from which a modality has pools of its own; None for pools over all modalities only.

    Returns:
        The positions of the pairs of each pool, and the modalities in lower case.
    """
    generator, start = np.random.default_rng(seed), 0
    none = np.zeros(0), np.zeros(0, dtype=np.int64)
    drawn: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {split: {ALL: none} for split in SPLITS}
    found: set[str] = set()
    for ids, splits, modalities in in_columns(pairs, ("id", "split", "modality")):
        numbers = generator.random(len(ids))
        members: dict[tuple[str, str], list[int]] = defaultdict(list)
        for row, (split, modality) in enumerate(zip(splits, modalities, strict=True)):
            members[split, modality].append(row)
        for (split, modality), rows in members.items():
            found.add(modality.lower())
            for name in {ALL, ALL if fewest is None or modality == UNKNOWN else modality}:
                before, positions = drawn[split].get(name, none)
                own = np.array(rows)
                if len(before) == size:
                    own = own[numbers[own] < before[-1]]
                own = own[features.seen([ids[row] for row in own.tolist()])]
                joined = np.concatenate([before, numbers[own]])
                order = np.argsort(joined)[:size]
                drawn[split][name] = joined[order], np.concatenate([positions, start + own])[order]
        start += len(ids)
    return {split: {name: own[1] for name, own in of.items()} for split, of in drawn.items()}, found


class Screen:
    """A rule applied to pairs, within their own split and modality."""

    def __init__(
        self,
        folder: PairFolder,
        features: TeacherFeatures,
        drawn: Drawn,
        fewest: int | None,
        rule: Rule,
        percentile: float,
        top: int,
    ) -> None:
        """Make the pools; ``percentile`` reads `percentile`, ``rank`` reads `top`, ``all`` passes every pair.

        Args:
            folder: the pairs.
            features: of all teachers.
            drawn: the pools' pairs, see `draw`.
            fewest: pairs from which a modality has pools of its own.
            rule: see `ScreenSettings`.
            percentile: of the mismatched similarities.
            top: rank that passes.
        """
        self.folder, self.features, self.rule, self.top = folder, features, rule, top
        self.pools: Pools = {split: _pools_of(folder.pairs, own, features, fewest or 0) for split, own in drawn.items()}
        self.thresholds = {
            split: {
                teacher: {modality: pool.threshold(percentile) for modality, pool in own.items()}
                for teacher, own in teachers.items()
            }
            for split, teachers in self.pools.items()
        }

    @classmethod
    def open(cls, pairs: Path, features: Path, teachers: Sequence[str], *rule: Any) -> Screen:
        """The same of folders; see `__init__`."""
        return cls(open_pairs(pairs), TeacherFeatures.open(features, teachers), *rule)

    def availability(self, pairs: Sequence[Pair], report: ScreeningReport) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Which pairs each teacher is available for, (n,) bool: it has their features and they pass the rule.

        Args:
            pairs: n pairs.
            report: takes the similarities of training pairs.

        Returns:
            That by teacher, and the pairs that any teacher has features of, (n,) bool.
        """
        places: dict[tuple[str, str], list[int]] = defaultdict(list)
        for k, pair in enumerate(pairs):
            places[pair.split, pair.modality].append(k)
        passed, present = {}, np.zeros(len(pairs), dtype=bool)
        for name, found in self.features.lookup([pair.id for pair in pairs]).items():
            image, text, passes = found["image"], found["text"], found["mask"].clone()
            for (split, modality), members in places.items():
                rows = torch.tensor(members)
                rows = rows[found["mask"][rows]]
                if split == "train":
                    report.add_similarities(name, (image[rows] * text[rows]).sum(dim=1).numpy())
                compared = modality if modality in self.pools[split][name] else ALL
                if self.rule == "percentile":
                    passes[rows] = above(image[rows], text[rows], self.thresholds[split][name][compared])
                elif self.rule == "rank":
                    pool = self.pools[split][name][compared]
                    own = Meanings.of([pairs[k] for k in rows.tolist()], pool.labels)
                    passes[rows] = within_top(image[rows], text[rows], own, pool, self.top)
            passed[name] = passes.numpy()
            present |= found["mask"].numpy()
        return passed, present

    def about_pools(self) -> dict[str, dict[str, Any]]:
        """Size, mismatches and thresholds of each teacher's pools of training pairs, for `ScreeningReport.summary`."""
        found = {}
        for name, own in self.pools["train"].items():
            thresholds = self.thresholds["train"][name] if self.rule == "percentile" else {}
            finite = {modality: value for modality, value in thresholds.items() if math.isfinite(value)}
            found[name] = {
                "pool": len(own[ALL].meanings),
                "threshold": finite.pop(ALL, None),
                "thresholds": finite,
                "mismatched": np.histogram(own[ALL].mismatched().clamp(-1, 1).numpy(), BINS)[0],
            }
        return found


def _pools_of(
    pairs: Sequence[Pair], drawn: dict[str, np.ndarray], features: TeacherFeatures, fewest: int
) -> dict[str, dict[str, Pool]]:
    """Each teacher's pools of a split; one of a modality only with enough pairs, and mismatches among them."""
    members = {modality: list(take_rows(pairs, rows)) for modality, rows in drawn.items()}
    labels = deciding_labels({pair.id: pair for each in members.values() for pair in each}.values())
    pools: dict[str, dict[str, Pool]] = defaultdict(dict)
    for modality, each in members.items():
        for teacher, found in features.lookup([pair.id for pair in each]).items():
            mask = found["mask"]
            own = [pair for pair, has_features in zip(each, mask.tolist(), strict=True) if has_features]
            pool = Pool(Meanings.of(own, labels), found["image"][mask], found["text"][mask], labels)
            if modality == ALL or (len(own) >= fewest and len(pool.mismatched()) >= fewest):
                pools[teacher][modality] = pool
    return dict(pools)


def screen_runs(
    opened: Callable[[], Screen],
    minimum: int,
    modalities: set[str],
    runs: Sequence[tuple[Path, range]],
    progress: Progress,
) -> None:
    """A task of `mmkd.command.tasks`: files of the pairs that stay of runs of pairs, and of the counts of all.

    Args:
        opened: gives the rule, which a process opens once.
        minimum: teachers that must agree.
        modalities: of training pairs, in lower case; empty for all.
        runs: files, and positions of pairs.
        progress: counts pairs.
    """
    screen = opened()
    for file, run in runs:
        report, tables = ScreeningReport(screen.features.names), []
        for start in range(run.start, run.stop, CHUNK):
            positions = np.arange(start, min(start + CHUNK, run.stop))
            pairs = list(take_rows(screen.folder.pairs, positions))
            passed, present = screen.availability(pairs, report)
            kept, agreeing = [], []
            for k, pair in enumerate(pairs):
                teachers = [name for name in screen.features.names if passed[name][k]]
                reason = _keep(pair, len(teachers), bool(present[k]), minimum, modalities)
                report.add(pair, teachers, reason)
                if reason == KEPT:
                    kept.append(k)
                    agreeing.append(teachers)
            tables.append(chosen_rows(screen.folder, positions[kept], agreeing))
            progress(len(pairs))
        schema = tables[0].schema.with_metadata({COUNTS: report.to_json()})
        write_table(file, schema, tables)


def counts_of(file: Path) -> bytes:
    """The counts in a file of `screen_runs`, for `ScreeningReport.add_json`."""
    counts: bytes = map_table(file).schema.metadata[COUNTS]
    return counts


def _keep(pair: Pair, teachers: int, has_features: bool, minimum: int, modalities: set[str]) -> str:
    """Whether a pair stays, or why not; held-out pairs always do."""
    if pair.split != "train":
        return KEPT
    if modalities and pair.modality.lower() not in modalities:
        return OTHER_MODALITY
    if teachers >= minimum:
        return KEPT
    return TOO_FEW if has_features else UNSEEN
