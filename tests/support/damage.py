"""Seeded damage to files and values, and how a command answers it."""

import copy
import os
import struct
import sys
import zlib

from mmkd.command.settings import run

ROUNDS = int(os.environ.get("MMKD_FAULTS", "2"))
DEEP = 100_000
STRANGE = (
    "wide",
    "",
    None,
    -1,
    0,
    2**63,
    1e400,
    0.5,
    True,
    [],
    {},
    [[]],
    "\x1b[31m",
    "\ud800",
    "../../etc/passwd",
    "x" * 9999,
)


def outcome(capsys, monkeypatch, settings, main, *arguments):
    """Exit code and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["mmkd test", *map(str, arguments)])
    code = 0
    try:
        run(settings, main)
    except SystemExit as ended:
        code = ended.code or 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    return code, captured.err


def damaged_bytes(content, generator):
    """Bytes cut off, flipped, replaced by other kinds of content."""
    flipped = bytearray(content)
    for _ in range(8):
        flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
    return [
        b"",
        content[: generator.randrange(1, len(content))],
        bytes(flipped),
        b"\x00" * 64,
        b"\xff\xfe" + content,
        b"[" * DEEP,
        b'{"a":' * DEEP,
        generator.randbytes(2048),
    ]


def damaged_values(values, generator):
    """Copies of a mapping in which one value of any depth is lost, or is of another type."""
    places = []

    def walk(part, place):
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((*place, key))
            if isinstance(part[key], (dict, list)):
                walk(part[key], (*place, key))

    walk(values, ())
    for place in generator.sample(places, min(6, len(places))):
        for value in generator.sample(STRANGE, 2):
            changed = copy.deepcopy(values)
            part = changed
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = value
            yield changed
        changed = copy.deepcopy(values)
        part = changed
        for key in place[:-1]:
            part = part[key]
        del part[place[-1]]
        yield changed


def png_of_size(width, height):
    """A PNG whose header claims a size, and which holds no pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
