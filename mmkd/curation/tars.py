"""WebDataset tars read by offsets: only what a sample turns out to need is read, images of dropped ones never are.

Members are grouped by name whatever their order. What is missing when a tar ends is handed on as fragments, so that a
sample cut in two by a shard's end is whole again when all shards have been read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mmkd.curation.samples import Fragment, Item, RawSample, Refused, kind_of
from mmkd.data.archives import ArchivedFile, DamagedArchive, Member, members
from mmkd.data.records import is_inside

MOST_FRAGMENT_BYTES = 256 << 20
LARGEST_TEXT = 64 << 20
Parts = dict[str, tuple[str, Member]]


def read_tar(path: Path) -> Iterator[Item]:
    """The samples of one tar in the order in which they become complete, then what is left over."""
    reader = _TarReader(path)
    try:
        for member in members(path):
            yield from reader.take(member)
    except DamagedArchive:
        yield Refused(path.name, "damaged_shard")
    yield from reader.leftovers()


class _TarReader:
    """Members waiting for the rest of their sample."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: dict[str, Parts] = {}
        self.finished: set[str] = set()
        self.repeated: set[str] = set()
        self.has_facts = False

    def take(self, member: Member) -> Iterator[Item]:
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        place = f"{self.path.name}:{name}"
        folder, _, base = name.rpartition("/")
        stem, dot, suffix = base.rpartition(".")
        suffix = suffix.lower()
        kind = kind_of(suffix)
        if ("/" in name or "\\" in name or ":" in name) and not is_inside(name):
            yield Refused(place, "path_outside")
        elif not member.plain:
            yield Refused(place, "link_in_archive")
        elif kind and not (stem and dot):
            yield Refused(place, "no_key")
        elif kind and not base.startswith("._"):  # macOS puts such beside every file
            key = f"{folder}/{stem}" if folder else stem
            yield from self._add(key, kind, suffix, member)

    def _add(self, key: str, kind: str, suffix: str, member: Member) -> Iterator[Item]:
        parts = self.waiting.setdefault(key, {})
        if key in self.finished or kind in parts:
            if key not in self.repeated:
                self.repeated.add(key)
                yield Refused(f"{self.path.name}:{key}", "duplicate_key")
            if not parts:
                del self.waiting[key]
            return
        parts[kind] = suffix, member
        self.has_facts = self.has_facts or kind == "facts"
        if len(parts) == 3:
            self.finished.add(key)
            yield self._sample(key, self.waiting.pop(key))

    def leftovers(self) -> Iterator[Item]:
        """Tars without any JSON hold images and captions alone; elsewhere a sample without all three is a fragment."""
        room = MOST_FRAGMENT_BYTES
        for key, parts in self.waiting.items():
            if not self.has_facts and len(parts) == 2:
                yield self._sample(key, parts)
                continue
            room -= sum(member.size for _, member in parts.values())
            place = f"{self.path.name}:{key}"
            if room < 0:
                missing = next(kind for kind in ("image", "caption", "facts") if kind not in parts)
                yield Refused(place, f"no_{missing}")
            else:
                yield Fragment(key, place, {kind: (s, self._read(m)) for kind, (s, m) in parts.items()})

    def _sample(self, key: str, parts: Parts) -> RawSample:
        suffix, image = parts["image"]
        return RawSample(
            key=key,
            place=f"{self.path.name}:{key}",
            caption=self._text(parts.get("caption")),
            facts=self._text(parts.get("facts")),
            read_image=partial(self._read, image),
            image_suffix=suffix,
        )

    def _text(self, part: tuple[str, Member] | None) -> bytes | None:
        if part is None:
            return None
        return self._read(part[1]) if part[1].size <= LARGEST_TEXT else b""

    def _read(self, member: Member) -> bytes:
        return ArchivedFile(self.path, member.offset, member.size).read_bytes()
