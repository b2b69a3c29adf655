"""Samples cut in two by the end of a shard, made whole from the fragments that the parts kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mmkd.curation.samples import Item, RawSample, Refused
from mmkd.data.archives import ArchivedFile, members
from mmkd.files import read_json

KINDS = ("image", "caption", "facts")


def joined_samples(parts: Path, count: int) -> Iterator[Item]:
    """What the fragments of all parts make together: whole samples, and what is missing of the others.

    Args:
        parts: the folder of parts.
        count: number of parts.
    """
    pieces: dict[str, list[tuple[int, int, list[str], str]]] = defaultdict(list)
    for part in range(count):
        for number, (key, place, kinds) in enumerate(read_json(parts / f"{part:06d}.json")["fragments"]):
            pieces[key].append((part, number, kinds, place))
    files = _FragmentFiles(parts)
    for key, found in pieces.items():
        where: dict[str, tuple[int, int]] = {}
        for part, number, kinds, _ in found:
            for kind in kinds:
                where.setdefault(kind, (part, number))
        missing = [kind for kind in KINDS if kind not in where]
        place = found[0][3]
        yield Refused(place, f"no_{missing[0]}") if missing else files.sample(key, place, where)


class _FragmentFiles:
    """The members that parts keep of their fragments, by part, number and kind."""

    def __init__(self, parts: Path) -> None:
        self.parts = parts
        self.known: dict[int, dict[tuple[int, str], tuple[str, ArchivedFile]]] = {}

    def sample(self, key: str, place: str, where: dict[str, tuple[int, int]]) -> RawSample:
        found = {kind: self._in_part(part)[number, kind] for kind, (part, number) in where.items()}
        caption, facts = found["caption"][1].read_bytes(), found["facts"][1].read_bytes()
        suffix, image = found["image"]
        return RawSample(key, place, caption, facts, image.read_bytes, suffix)

    def _in_part(self, part: int) -> dict[tuple[int, str], tuple[str, ArchivedFile]]:
        if part not in self.known:
            archive = self.parts / f"{part:06d}.fragments.tar"
            self.known[part] = {}
            for member in members(archive):
                number, kind, suffix = member.name.split(".")
                file = ArchivedFile(archive, member.offset, member.size)
                self.known[part][int(number), kind] = suffix, file
        return self.known[part]
