"""Recipe settings: a dataclass whose defaults YAML may change and the command line may change again.

``--config FILE.yaml`` gives values (``--config NAME`` those of a file that comes with the package), ``--key value``
overrides them, ``--losses.task 0.5`` sets one entry of a mapping. A key that is not a field is refused with the nearest
name, since a misspelt setting that silently does nothing costs a training run. Values are converted by the field's
type, never evaluated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.resources
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from safetensors import SafetensorError

from mmkd.command.values import FALSE, TRUE, bare, convert, nearest, type_name
from mmkd.files import atomic_write_text

T = TypeVar("T")


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    preset: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    positional: bool = False,
) -> Any:
    """A dataclass field with a help text; without a default or factory the setting is required.

    ``preset`` belongs to a mapping: from the other settings that are given to what ``--mapping.entry value`` changes
    when the mapping itself is not given. One field may be ``positional``: it is then also what stands on the command
    line without a name.
    """
    metadata = {"help": help, "preset": preset, "positional": positional}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(settings_class: type[T], argv: list[str] | None = None) -> T:
    """Build settings from ``--config`` and ``--key value`` arguments.

    Args:
        settings_class: a dataclass; its fields are the allowed keys.
        argv: the arguments, by default those of the process.

    Raises:
        ValueError: an unknown key, a value of the wrong type, or a required key that is missing.
        FileNotFoundError: the YAML file does not exist.
        SystemExit: ``--help`` was asked for and printed.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(settings_class))
        raise SystemExit(0)
    values = given_values(settings_class, argv)
    for field in dataclasses.fields(settings_class):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ValueError(f"--{field.name} is required: {field.metadata.get('help') or 'see --help'}")
    return settings_class(**values)


def given_values(settings_class: type, argv: list[str]) -> dict[str, Any]:
    """What ``--config`` and ``--key value`` arguments give, by name and of the right type; required ones may lack.

    A mapping in a later ``--config`` is merged into that of an earlier one.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
        FileNotFoundError: the YAML file does not exist.
    """
    hints = typing.get_type_hints(settings_class)
    mappings = [field for field in dataclasses.fields(settings_class) if get_origin(bare(hints[field.name])) is dict]
    values: dict[str, Any] = {
        field.name: field.default_factory() for field in mappings if callable(field.default_factory)
    }
    given = _split_arguments(argv, hints, _positional(settings_class))
    is_yaml = "config" not in hints  # a recipe with a setting of this name means its own file by it
    merged: set[str] = set()
    for path in [value for key, value in given if key == "config" and is_yaml]:
        _merge_yaml(values, Path(path), hints, merged)
    for key, text in given:
        if "." not in key and (key != "config" or not is_yaml):
            values[key] = convert(key, text, hints[key])
            merged.add(key)
    presets = {field.name: field.metadata.get("preset") for field in mappings if field.name not in merged}
    for key, text in given:
        if "." in key:
            _set_entry(values, key, text, hints, presets)
    return values


def run(settings_class: type[T], main: Callable[[T], None]) -> None:
    """Parse and run; errors meant for the user become one line and exit code 1 (2 for wrong settings, 130 for ^C).

    With ``--check`` the names and types of the given settings are checked and nothing is run.
    """
    try:
        if "--check" in sys.argv:
            given_values(settings_class, [argument for argument in sys.argv[1:] if argument != "--check"])
            return
        with ends_when_unread():
            settings = parse(settings_class)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        with ends_when_unread():
            main(settings)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {_told(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; what is whole stays, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


def _told(error: Exception) -> str:
    """An error of the operating system as ``FILE: what is wrong``, any other in its own words."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}{'; free some and try again' if error.errno == errno.ENOSPC else ''}"
    return str(error)


def resolved(settings: Any) -> dict[str, Any]:
    """Settings as plain YAML types, in field order."""
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def save_settings(settings: Any, path: Path) -> None:
    """Write the resolved settings as YAML that ``--config`` reads back."""
    atomic_write_text(path, yaml.safe_dump(resolved(settings), sort_keys=False, allow_unicode=True))


def help_text(settings_class: type) -> str:
    """The class' docstring and one line for each setting."""
    hints = typing.get_type_hints(settings_class)
    ways = "--key value" if "config" in hints else "--config FILE.yaml, --key value"
    lines = [inspect.cleandoc(settings_class.__doc__ or ""), "", f"settings ({ways}; --check only checks them):"]
    for field in dataclasses.fields(settings_class):
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = "required" if default is dataclasses.MISSING else f"default {_shown(default)}"
        name = f"[--{field.name}]" if field.metadata.get("positional") else f"--{field.name}"
        lines.append(f"  {name} {type_name(hints[field.name])}  {field.metadata.get('help', '')} [{shown}]")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    """A default as one would type it."""
    plain = _plain(default)
    if plain is None or plain in ("", [], {}):
        return "none" if plain is None else "empty"
    if isinstance(plain, list):
        return ",".join(map(str, plain))
    return str(plain).lower() if isinstance(plain, bool) else str(plain)


def _positional(settings_class: type) -> str | None:
    fields = dataclasses.fields(settings_class)
    return next((field.name for field in fields if field.metadata.get("positional")), None)


def _split_arguments(argv: list[str], hints: dict[str, Any], positional: str | None) -> list[tuple[str, str]]:
    """``--key value``, ``--key=value``, for switches ``--key`` alone, and one value without a key if there may be."""
    pairs: list[tuple[str, str]] = []
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if not argument.startswith("--") and positional and positional not in dict(pairs):
            pairs.append((positional, argument))
            continue
        if not argument.startswith("--"):
            raise ValueError(f"unexpected argument {argument!r}: settings are given as --key value")
        key, equals, value = argument[2:].partition("=")
        key = _known(key, hints)
        following = argv[position] if position < len(argv) else None
        if equals:
            pairs.append((key, value))
        elif hints.get(key) is bool and (following is None or following.lower() not in TRUE + FALSE):
            pairs.append((key, "true"))
        elif following is None or following.startswith("--"):
            raise ValueError(f"--{key} needs a value")
        else:
            pairs.append((key, following))
            position += 1
    return pairs


def _known(key: str, hints: dict[str, Any]) -> str:
    """The key with dashes as underscores, if it is a field or an entry of a mapping field."""
    head, dot, entry = key.partition(".")
    name = head.replace("-", "_")
    if name != "config" and (name not in hints or (dot and get_origin(bare(hints[name])) is not dict)):
        raise ValueError(f"unknown setting --{key}{nearest(name, hints)}; allowed: {', '.join(sorted(hints))}")
    return name + dot + entry


def _merge_yaml(values: dict[str, Any], path: Path, hints: dict[str, Any], merged: set[str]) -> None:
    """Take what a file gives; a mapping that an earlier file (its name in ``merged``) gave keeps its other entries."""
    path = _packaged(path)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold `key: value` lines, not a {type(loaded).__name__}")
    for key, value in loaded.items():
        try:
            name = _known(str(key), hints)
            converted = convert(name, value, hints[name])
            both = name in merged and isinstance(converted, dict)
            values[name] = {**values[name], **converted} if both else converted
            merged.add(name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _set_entry(values: dict[str, Any], key: str, text: str, hints: dict[str, Any], presets: dict[str, Any]) -> None:
    """One entry of a mapping, over the mapping that was given or its preset."""
    name, _, entry = key.partition(".")
    preset = presets.pop(name, None)
    if preset is not None:
        values[name] = preset(values)
    values[name] = {**values.get(name, {}), entry: convert(key, text, get_args(bare(hints[name]))[1])}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _packaged(path: Path) -> Path:
    """The file, or the one of this name that comes with the package, such as ``distill_paper``."""
    if path.is_file():
        return path
    presets = Path(str(importlib.resources.files("mmkd.train.configs")))
    known = sorted(file.stem for file in presets.glob("*.yaml") if not file.stem.startswith("accelerate_"))
    if str(path) in known:
        return presets / f"{path}.yaml"
    raise FileNotFoundError(f"--config {path}: no such file{nearest(str(path), known)}; packaged: {', '.join(known)}")


# Section: Output that nobody reads any more, as of ``mmkd eval --help | head``: the command ends without a word.


CLOSED = 141  # 128 + SIGPIPE: how a shell tells that the reader of a pipe left first


@contextlib.contextmanager
def ends_when_unread() -> Iterator[None]:
    """Flush what the block prints; where its reader has gone, nothing is said and nothing more is written.

    Other broken pipes, such as that of a process that died, stay errors.

    Raises:
        SystemExit: with 141, standard output is a closed pipe.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again as it ends
        raise SystemExit(CLOSED) from None


def _is_unread() -> bool:
    """Whether standard output takes no further line, whatever is buffered of it."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


# Section: Commands with several actions, as ``mmkd pairs ls`` and ``mmkd pairs verify``, each with settings of its own.


Actions = Mapping[str, tuple[type, Callable[[Any], None]]]


def run_action(command: str, actions: Actions, argv: list[str]) -> None:
    """Run the action that the first argument names, with the others as its settings.

    Args:
        command: name of the command, for help and errors.
        actions: action -> its settings and function.
        argv: the program and its arguments.

    Raises:
        SystemExit: 0 after the help, 2 when no action is named.
    """
    name = argv[1] if len(argv) > 1 else ""
    if name in actions:
        sys.argv = [f"{argv[0]} {name}", *argv[2:]]
        run(*actions[name])
        return
    if name in ("", "-h", "--help"):
        for action, (settings, _) in actions.items():
            print(f"mmkd {command} {action}: {help_text(settings)}\n")
        raise SystemExit(0)
    print(f"error: {command} has no {name!r}{nearest(name, actions)}; it has: {', '.join(actions)}", file=sys.stderr)
    raise SystemExit(2)
