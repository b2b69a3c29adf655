"""Everything that decides what a curation writes; two runs with equal values and sources write equal bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mmkd.curation.rules import SampleRules
from mmkd.data.stored_images import JPEG_QUALITY, check_quality

NearMode = Literal["off", "both", "image", "caption"]


@dataclass(frozen=True)
class StreamRules:
    """Rules for samples, and what is done with those that stay.

    Attributes:
        sample: which samples stay.
        short_side: larger images are stored with this shorter side in pixels; 0 keeps their bytes.
        jpeg_quality: of JPEG files that are stored smaller, see `mmkd.data.stored_images.encode`.
        split_panels: one pair for each panel that a compound caption names.
        mentions: sentences of the article that mention the figure, added to the caption; 0 for none.
        scrub: replace obvious identifiers of people in captions.
        near_duplicates: drop a pair of which another has nearly the same image and caption (both), image or caption.
        image_distance: bits of 64 in which perceptual hashes of near images may differ.
        caption_similarity: Jaccard similarity of three-word shingles from which captions are near.
        validation_share: part of the groups (articles) held out for validation where a source gives no split.
        test_share: the same for testing.
        max_pairs: most pairs to keep, 0 for all.
        list_dropped: write ``dropped.jsonl`` with the place and reason of every dropped sample.
        seed: of splits and of the choice of ``max_pairs``.
    """

    sample: SampleRules = field(default_factory=SampleRules)
    short_side: int = 0
    jpeg_quality: int = JPEG_QUALITY
    split_panels: bool = False
    mentions: int = 0
    scrub: bool = False
    near_duplicates: NearMode = "both"
    image_distance: int = 4
    caption_similarity: float = 0.8
    validation_share: float = 0.0
    test_share: float = 0.0
    max_pairs: int = 0
    list_dropped: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        """Refuse values out of range, before anything is read."""
        if min(self.short_side, self.mentions, self.max_pairs) < 0:
            raise ValueError("short_side, mentions and max_pairs must be 0 or more")
        check_quality(self.jpeg_quality)
        if not 0 <= self.image_distance <= 7:
            raise ValueError(f"image_distance is {self.image_distance}; allowed: 0 to 7 of 64 bits")
        if not 0.5 <= self.caption_similarity <= 1:
            raise ValueError(f"caption_similarity is {self.caption_similarity}; allowed: 0.5 to 1")
        if min(self.validation_share, self.test_share) < 0 or self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share must be 0 or more and together less than 1")

    def as_dict(self) -> dict[str, Any]:
        """All values as JSON types."""
        return dataclasses.asdict(self)
