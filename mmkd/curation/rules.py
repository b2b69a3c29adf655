"""Rules of curation, read from YAML: what is kept, and the reason for each dropped sample.

Modalities, licence families and the presets are data files beside this one: ``paper.yaml`` for WebDataset tars,
``list.yaml`` for labelled images, ``any.yaml`` for all else; a file of your own replaces them. A condition names a
field of the sample's metadata: ``any`` requires one of the listed values, ``only`` allows no other.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from mmkd.curation.samples import Metadata
from mmkd.data.images import JPEG_QUALITY, check_quality
from mmkd.data.pixel_rules import Window, WindowPreset
from mmkd.data.table import UNKNOWN
from mmkd.files import read_yaml

NearMode = Literal["off", "both", "image", "caption"]
HERE = Path(__file__).parent
PRESETS = ("paper", "list", "any")
LICENSE_FAMILIES = ("commercial", "noncommercial", "other")
PANEL_TYPES = ("single", "multiple")
KEY_SUBSET = re.compile(r"filelist_(commercial|noncommercial|other)_")
LICENSE_NOISE = re.compile(r"\d\.\d|[-_/]|\b(?:INTERNATIONAL|UNPORTED|LICEN[SC]E)\b")
DEFAULT_REASON = "drop_rule"
MIDDLE, EACH = "middle", "each"


@dataclass(frozen=True, slots=True)
class Condition:
    """``field`` holds one of ``any``, and nothing outside ``only``; the comparison ignores case."""

    field: str
    any: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    name: str = DEFAULT_REASON

    def holds(self, metadata: Metadata) -> bool:
        """Whether a sample meets the condition."""
        values = [value.casefold() for value in metadata.values(self.field)]
        one = not self.any or any(value in self.any for value in values)
        return one and (not self.only or (bool(values) and all(value in self.only for value in values)))


@dataclass(frozen=True)
class Rules:
    """Everything that determines the output of a curation: equal rules and sources give equal bytes.

    Attributes:
        licenses: families of ``licenses.yaml`` or single licences; empty for any.
        panel_types: single, multiple; empty for any.
        languages: ISO 639-1 codes; empty for any.
        modalities: modality -> clusters that mean it; empty for pairs of every kind.
        keep: conditions that a sample must meet, all of them.
        drop: conditions of which a sample may meet none.
        minimum_side: images with a shorter side in pixels are dropped.
        minimum_words: shorter captions are dropped.
        maximum_words: longer captions are dropped.
        near_duplicates: drop a pair of which another has nearly the same image and caption (both), image or caption.
        validation_share: share of the groups (patients, articles) held out for validation where the source gives none.
        test_share: the same for testing.
        short_side: larger images are stored with this shorter side in pixels; 0 keeps their bytes.
        jpeg_quality: of JPEG files that are stored smaller, see `mmkd.data.images.encode`.
        window: how DICOM and NIfTI become 8-bit images, see `mmkd.data.pixel_rules.Window`.
        frame: of DICOM files with several frames and of NIfTI volumes: middle, a number from 1, or each, which makes an
            image of every frame of DICOM files.
        burned_in: keep files of DICOM folders that state to show text about the patient.
        secondary_captures: keep screenshots and scanned documents of DICOM folders.
        split_panels: one pair for each panel that a compound caption names.
        mentions: sentences of the article that mention the figure, added to the caption; 0 for none.
        scrub: replace obvious identifiers of people in captions.
        image_distance: bits of 64 in which perceptual hashes of near images may differ.
        caption_similarity: Jaccard similarity of three-word shingles from which captions are near.
        max_pairs: maximum number of pairs, 0 for all; whole groups, in proportion to split, modality and label.
        seed: of splits and of the choice of ``max_pairs``.
    """

    licenses: tuple[str, ...] = ()
    panel_types: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    modalities: dict[str, tuple[int, ...]] = field(default_factory=dict)
    keep: tuple[Condition, ...] = ()
    drop: tuple[Condition, ...] = ()
    minimum_side: int = 8
    minimum_words: int = 1
    maximum_words: int = 1000
    near_duplicates: NearMode = "both"
    validation_share: float = 0.0
    test_share: float = 0.0
    short_side: int = 0
    jpeg_quality: int = JPEG_QUALITY
    window: WindowPreset = "auto"
    frame: str = MIDDLE
    burned_in: bool = False
    secondary_captures: bool = False
    split_panels: bool = False
    mentions: int = 0
    scrub: bool = False
    image_distance: int = 4
    caption_similarity: float = 0.8
    max_pairs: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        """Refuse invalid values, and those that would drop everything, before anything is read."""
        wrong = [value for value in self.panel_types if value not in PANEL_TYPES]
        if wrong:
            raise ValueError(f"panel_types: {wrong[0]!r} is unknown; allowed: {', '.join(PANEL_TYPES)}")
        if self.near_duplicates not in get_args(NearMode):
            raise ValueError(f"near_duplicates is {self.near_duplicates!r}; allowed: {', '.join(get_args(NearMode))}")
        if not 1 <= self.minimum_words <= self.maximum_words or self.minimum_side < 1:
            raise ValueError(
                "minimum_side must be 1 or more and 1 <= minimum_words <= maximum_words; got "
                f"{self.minimum_side}, {self.minimum_words}, {self.maximum_words}"
            )
        if min(self.short_side, self.mentions, self.max_pairs) < 0:
            raise ValueError("short_side, mentions and max_pairs must be 0 or more")
        check_quality(self.jpeg_quality)
        if self.frame not in (MIDDLE, EACH) and not (self.frame.isdecimal() and int(self.frame) > 0):
            raise ValueError(f"frame is {self.frame!r}; allowed: {MIDDLE}, {EACH} or a number from 1")
        self.pixel_window()
        if not 0 <= self.image_distance <= 7:
            raise ValueError(f"image_distance is {self.image_distance}; allowed: 0 to 7 of 64 bits")
        if not 0.5 <= self.caption_similarity <= 1:
            raise ValueError(f"caption_similarity is {self.caption_similarity}; allowed: 0.5 to 1")
        if min(self.validation_share, self.test_share) < 0 or self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share must be 0 or more and together less than 1")

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the metadata that conditions name."""
        return tuple(sorted({condition.field for condition in (*self.keep, *self.drop)}))

    def pixel_window(self, frame: int = 0) -> Window:
        """The window of one frame, by default of the one that the rules name."""
        return Window(self.window, frame or (int(self.frame) if self.frame.isdecimal() else 0))

    def judge(self, key: str, metadata: Metadata) -> tuple[str, str]:
        """Modality and empty reason of a sample that is kept; empty modality and reason of a dropped one."""
        if self.licenses and not set(_license_names(key, metadata)) & set(self.licenses):
            return "", "license"
        if self.panel_types and metadata.text("image_panel_type") not in self.panel_types:
            return "", "panel_type"
        modality = self._modality(metadata)
        if not modality:
            return "", "modality"
        if not all(condition.holds(metadata) for condition in self.keep):
            return "", "keep_rule"
        dropped = next((condition.name for condition in self.drop if condition.holds(metadata)), "")
        return (modality, "") if not dropped else ("", dropped)

    def _modality(self, metadata: Metadata) -> str:
        labels = [label.casefold() for label in metadata.values("image_secondary_label")]
        stated = metadata.text("modality")
        if not self.modalities:
            return stated or next(iter(labels), "") or UNKNOWN
        named = next((label for label in (*labels, stated.casefold()) if label in self.modalities), "")
        return named or ("" if labels else self._clusters.get(metadata.text("image_label_id"), ""))

    @cached_property
    def _clusters(self) -> dict[str, str]:
        """The modality of each cluster."""
        return {str(cluster): modality for modality, clusters in self.modalities.items() for cluster in clusters}


def read_rules(preset: str, **changes: Any) -> Rules:
    """The rules of a preset or a YAML file, with some values changed.

    Args:
        preset: paper, list, any, or a file.
        changes: field -> value that replaces the file's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown key or a value of the wrong type; the message names it.
    """
    path = HERE / f"{preset}.yaml" if preset in PRESETS else Path(preset)
    values = _yaml(path, f"--preset {preset}: neither {', '.join(PRESETS)} nor a file") | changes
    known = {field.name: field for field in dataclasses.fields(Rules)}
    wrong = [key for key in values if key not in known]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]!r} is unknown; allowed: {', '.join(known)}")
    read: dict[str, Any] = {}
    for key, value in values.items():
        default: Any = known[key].default
        if key == "near_duplicates" and value is False:  # YAML reads off as false
            value = "off"
        if key == "frame":
            value = str(value)
        if key == "modalities":
            read[key] = _modalities(path, value)
        elif key in ("keep", "drop"):
            read[key] = _conditions(path, key, value)
        elif isinstance(default, tuple):
            read[key] = _texts(path, key, value)
        else:
            allowed = (int, float) if isinstance(default, float) else type(default)
            if not isinstance(value, allowed) or (isinstance(value, bool) and not isinstance(default, bool)):
                raise ValueError(f"{path}: {key} must be of type {type(default).__name__}, not {value!r}")
            read[key] = float(value) if isinstance(default, float) else value
    licenses = (name if name in LICENSE_FAMILIES else plain_license(name) for name in read.get("licenses", ()))
    try:
        return Rules(**read | {"licenses": tuple(licenses)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def plain_license(name: str) -> str:
    """A licence without version, hyphens and case: ``CC-BY-NC 4.0`` is ``CC BY NC``."""
    return " ".join(LICENSE_NOISE.sub(" ", name.upper().replace("CC 0", "CC0")).split())


@lru_cache(4096)
def license_family(name: str) -> str:
    """Commercial, noncommercial or other."""
    families = _yaml(HERE / "licenses.yaml", "")
    return next((family for family, names in families.items() if plain_license(name) in names), "other")


def _license_names(key: str, metadata: Metadata) -> tuple[str, ...]:
    """The licence and its family; if none is stated, the family from BIOMEDICA's key."""
    stated = metadata.text("article_license") or metadata.text("license")
    if stated:
        return plain_license(stated), license_family(stated)
    subset = KEY_SUBSET.search(key)
    return (subset[1],) if subset else ("other",)


def _modalities(path: Path, value: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(value, str):
        beside = [folder / value for folder in (path.parent, HERE) if (folder / value).is_file()]
        value = _yaml(beside[0] if beside else Path(value), f"{path}: modalities {value}: no such file")
    if not isinstance(value or [], (dict, list)):
        raise ValueError(f"{path}: modalities must be names, or a file of names and clusters, not {value!r}")
    if isinstance(value, dict):
        return {str(name).casefold(): tuple(map(int, clusters or ())) for name, clusters in value.items()}
    shipped = _yaml(HERE / "modalities.yaml", "")
    return {str(name).casefold(): tuple(shipped.get(str(name).casefold(), ())) for name in value or ()}


def _conditions(path: Path, key: str, value: Any) -> tuple[Condition, ...]:
    conditions = []
    for entry in value or ():
        if not isinstance(entry, dict) or "field" not in entry or not set(entry) <= {"field", "any", "only", "name"}:
            raise ValueError(f"{path}: {key} holds {entry!r}; write {{field: NAME, any: [..]}} or {{.., only: [..]}}")
        lists = {name: tuple(v.casefold() for v in _texts(path, key, entry.get(name))) for name in ("any", "only")}
        if not (lists["any"] or lists["only"]):
            raise ValueError(f"{path}: {key} of {entry['field']} lists no values under any or only")
        conditions.append(Condition(str(entry["field"]), **lists, name=str(entry.get("name", DEFAULT_REASON))))
    return tuple(conditions)


def _texts(path: Path, key: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or not all(isinstance(entry, (str, int)) for entry in values):
        raise ValueError(f"{path}: {key} must be a list of texts, not {value!r}")
    return tuple(map(str, values))


def _yaml(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(missing)
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines")
    return values
