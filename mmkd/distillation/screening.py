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

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.folder import PairFolder, in_chunks
from mmkd.data.table import SPLITS, UNKNOWN, Pair
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


class ScreeningReport:
    """Counts of pairs in a stream; its size grows with their labels, not with them."""

    def __init__(self, teachers: Sequence[str]) -> None:
        """Start at zero."""
        self.teachers = list(teachers)
        self.reasons: Counter[str] = Counter()
        self.agreeing: Counter[int] = Counter()
        self.available: Counter[str] = Counter()
        self.modalities: Counter[str] = Counter()
        self.kept_of: Counter[str] = Counter()
        self.classes: Counter[tuple[str, str]] = Counter()
        self.kept_of_class: Counter[tuple[str, str]] = Counter()
        self.available_of: Counter[tuple[str, str]] = Counter()
        self.held_out = 0
        self.own = {name: np.zeros(len(BINS) - 1, dtype=np.int64) for name in teachers}

    def add(self, pair: Pair, available: Sequence[str], reason: str) -> None:
        """Count a pair: the teachers available for it, and whether it stays or why not."""
        if pair.split != "train":
            self.held_out += 1
            return
        modality = pair.modality or "unnamed"
        self.reasons[reason] += 1
        self.agreeing[len(available)] += 1
        self.available.update(available)
        self.modalities[modality] += 1
        self.kept_of[modality] += reason == KEPT
        self.available_of.update((modality, name) for name in available)
        if pair.label:
            self.classes[modality, pair.label] += 1
            self.kept_of_class[modality, pair.label] += reason == KEPT

    def add_similarities(self, teacher: str, similarities: np.ndarray) -> None:
        """Count similarities (n,) of a teacher's own image-caption pairs."""
        self.own[teacher] += np.histogram(np.clip(similarities, -1, 1), BINS)[0]

    def summary(self, minimum: int, pools: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Everything as JSON; training pairs = kept + dropped = sum of ``agreeing``, by modality and by teacher, too.

        Args:
            minimum: teachers that had to agree.
            pools: teacher -> ``pool`` (its size), ``threshold`` and ``mismatched`` (counts by bin) of its pool over all
                modalities, ``thresholds`` by modality.
        """
        total = sum(self.reasons.values())
        dropped = {reason: self.reasons[reason] for reason in (TOO_FEW, UNSEEN, OTHER_MODALITY)}
        modalities = {
            modality: {
                "pairs": count,
                "kept": self.kept_of[modality],
                "available": {name: self.available_of[modality, name] for name in self.teachers},
            }
            for modality, count in sorted(self.modalities.items())
        }
        classes = [
            {"modality": modality, "label": label, "pairs": count, "kept": self.kept_of_class[modality, label]}
            for (modality, label), count in sorted(self.classes.items(), key=lambda item: (-item[1], item[0]))
        ]
        similarities = {
            name: {**pools[name], "own": histogram(self.own[name]), "mismatched": histogram(pools[name]["mismatched"])}
            for name in self.teachers
        }
        return {
            "minimum_teachers": minimum,
            "train": {"pairs": total, "kept": self.reasons[KEPT], "dropped": dropped},
            "held_out_kept_unscreened": self.held_out,
            "agreeing_teachers": {str(count): self.agreeing[count] for count in range(len(self.teachers) + 1)},
            "available": {name: self.available[name] for name in self.teachers},
            "modalities": modalities,
            "classes": classes[:SHOWN_CLASSES],
            "depleted_classes": depleted(classes),
            "similarities": similarities,
        }


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


def draw_pools(
    folder: PairFolder, features: TeacherFeatures, size: int, seed: int, fewest: int | None
) -> tuple[Pools, set[str]]:
    """For each split and modality random pairs that teachers have features of; and the modalities of all pairs.

    Every pair gets a random number, and those with the smallest ones are drawn: one pass, and the same pairs for all.

    Args:
        folder: the pairs.
        features: of all teachers.
        size: pairs of a pool.
        seed: of the draw.
        fewest: pairs from which a modality has pools of its own; None for pools over all modalities only.

    Returns:
        The pools, and the modalities in lower case.
    """
    generator = np.random.default_rng(seed)
    drawn: dict[str, dict[str, list[tuple[float, str, Pair]]]] = {split: {ALL: []} for split in SPLITS}
    modalities: set[str] = set()
    for _, pairs in in_chunks(folder.pairs):
        present, order = features.seen([pair.id for pair in pairs]), generator.random(len(pairs))
        for pair, has_features, place in zip(pairs, present.tolist(), order.tolist(), strict=True):
            modalities.add(pair.modality.lower())
            own = ALL if fewest is None or pair.modality == UNKNOWN else pair.modality
            for name in {ALL, own} if has_features else ():
                drawn[pair.split].setdefault(name, []).append((place, pair.id, pair))
        drawn = {split: {name: sorted(members)[:size] for name, members in own.items()} for split, own in drawn.items()}
    return {split: _pools_of(own, features, fewest or 0) for split, own in drawn.items()}, modalities


class Screen:
    """A rule applied to pairs, within their own split and modality."""

    def __init__(self, features: TeacherFeatures, pools: Pools, rule: Rule, percentile: float, top: int) -> None:
        """Screen by `rule`: ``percentile`` reads `percentile`, ``rank`` reads `top`, ``all`` passes every pair."""
        self.features, self.pools, self.rule, self.top = features, pools, rule, top
        self.thresholds = {
            split: {
                teacher: {modality: pool.threshold(percentile) for modality, pool in own.items()}
                for teacher, own in teachers.items()
            }
            for split, teachers in pools.items()
        }

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
    drawn: dict[str, list[tuple[float, str, Pair]]], features: TeacherFeatures, fewest: int
) -> dict[str, dict[str, Pool]]:
    """Each teacher's pools of a split; one of a modality only with enough pairs, and mismatches among them."""
    labels = deciding_labels({id: pair for members in drawn.values() for _, id, pair in members}.values())
    pools: dict[str, dict[str, Pool]] = defaultdict(dict)
    for modality, members in drawn.items():
        pairs = [pair for _, _, pair in members]
        for teacher, found in features.lookup([pair.id for pair in pairs]).items():
            mask = found["mask"]
            own = [pair for pair, has_features in zip(pairs, mask.tolist(), strict=True) if has_features]
            pool = Pool(Meanings.of(own, labels), found["image"][mask], found["text"][mask], labels)
            if modality == ALL or (len(own) >= fewest and len(pool.mismatched()) >= fewest):
                pools[teacher][modality] = pool
    return dict(pools)
