"""Settings of a recipe: a dataclass whose defaults a YAML file may change and the command line may change again.

``--config FILE.yaml`` gives values (``--config NAME`` those of a file that comes with the package), ``--key value``
overrides them, ``--losses.task 0.5`` sets one entry of a mapping. The command line is read by cyclopts. An unknown key
is refused with the nearest name, since a misspelt setting that silently does nothing costs a training run. Values are
converted to the field's type, never evaluated.

``--help`` shows the docstring of the settings class, whose section ``Example:`` holds commands, and the settings under
headings, required ones first. The class that declares a setting lists its name under a heading in ``GROUPS``, or has
one heading for all its settings, ``GROUP``; headings come in the order of `GROUPS` here.

A recipe calls `check_arguments` after its settings class and before the imports that take seconds, so that ``--help``
and a mistake are answered at once, and `run` at its end. A command with several actions (``mmkd pairs ls``) gives both
a mapping of action -> settings class instead of one class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib.resources
import inspect
import io
import math
import operator
import os
import shutil
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

import cyclopts
import yaml
from cyclopts import App, Group, Parameter, Token
from rich.console import Console
from safetensors import SafetensorError

from mmkd.command.launch import allow_open_files, end_with_parent
from mmkd.files import atomic_write_text, exclusive, files_read, read_yaml

T = TypeVar("T")
Command = type | Mapping[str, type]

DEBUG_VARIABLE = "MMKD_DEBUG"  # environment variable: show tracebacks
COMMAND_VARIABLE = "MMKD_COMMAND"  # environment variable: the name under which `mmkd` runs a recipe
UNPRINTABLE = (*range(32), *range(127, 160), *range(0xD800, 0xE000))  # the last ones are halves of characters
CONTROLS = {code: "\ufffd" for code in UNPRINTABLE if chr(code) not in "\n\r\t"}
BROKEN_PIPE = 141  # 128 + SIGPIPE: the exit code that a shell gives a program whose reader left first
BOOLEANS = ("true", "false", "yes", "no", "1", "0", "on", "off")
NONE = ("none", "null", "")
GROUPS = (
    *("settings", "data", "images", "reports", "captions", "duplicates", "model", "losses", "tasks", "statistics"),
    *("optimisation", "validation", "computing", "checkpoints and logging"),
)
REQUIRED, COMMON = Group("required", sort_key=-1), Group("command", sort_key=len(GROUPS))
EXAMPLE = "Example:"
LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {  # of a number: in words, and its test
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    preset: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    positional: bool = False,
    whole: bool = False,
    **limits: float,
) -> Any:
    """A dataclass field with a help text; without a default or factory the setting is required.

    Args:
        default: value where none is given.
        help: one line for ``--help``.
        factory: makes the default, where it is a list or mapping.
        preset: of a mapping: the entries that ``--mapping.entry value`` changes, as a function of the other settings
            that are given, where no file gives the mapping itself.
        positional: the value may stand on the command line without its name, in the order of the fields; a list comes
            last.
        whole: words of a list that stand without its name are not split at commas, which sentences and names of files
            may hold.
        limits: of a number, by the names in `LIMITS`.
    """
    assert limits.keys() <= LIMITS.keys(), f"limits are {', '.join(LIMITS)}, not {', '.join(limits)}"
    metadata = {"help": help, "preset": preset, "positional": positional, "whole": whole, "limits": limits}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def run(
    command: type[T] | Mapping[str, type[T]],
    main: Callable[[T], None],
    outputs: Callable[[T], Iterable[Path]] | None = None,
) -> None:
    """Read the settings and call ``main`` with them; errors become one line, with ``--debug`` a traceback.

    Args:
        command: see `parse`.
        main: the recipe.
        outputs: files and folders that the run writes and holds against other runs, by default the setting ``output``;
            with several processes, the first of them holds them for all.

    Raises:
        SystemExit: with 2 for wrong settings, 1 for an error of the recipe, 130 after ctrl-C.
        ModuleNotFoundError: a package is not installed; `mmkd` says how to install it.
    """
    settings = _from_process(lambda: parse(command))
    allow_open_files()
    is_first = os.environ.get("RANK", "0") == "0"
    if "RANK" in os.environ:
        end_with_parent()
    written: list[Path] = []
    try:
        with printable_output(), ignore_broken_pipe(), contextlib.ExitStack() as held:
            named = outputs(settings) if outputs is not None else [getattr(settings, "output", None)]
            written += (path for path in named if isinstance(path, Path))
            for output in written if is_first else ():
                held.enter_context(exclusive(output))
            main(settings)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if DEBUG_VARIABLE in os.environ:
            raise
        fail(1, _message(error, written))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from None


def check_arguments(command: Command) -> None:
    """Answer ``--help``, ``--check`` and wrong settings, before a recipe imports what takes seconds.

    Raises:
        SystemExit: with 0 after ``--help`` and ``--check``, 2 for a wrong setting.
    """
    _from_process(lambda: given_values(*_action(command, sys.argv[1:])))


def parse(command: type[T] | Mapping[str, type[T]], argv: Sequence[str] | None = None) -> T:
    """Build settings from the command line.

    Args:
        command: a dataclass whose fields are the allowed keys, or a mapping from action to such a dataclass.
        argv: the arguments, by default those of the process.

    Raises:
        ValueError: an unknown key, a value of the wrong type, or a required key that is missing.
        FileNotFoundError: a YAML file does not exist.
        SystemExit: ``--help`` or ``--check`` was given.
    """
    settings_class, arguments, action = _action(command, list(sys.argv[1:] if argv is None else argv))
    values = given_values(settings_class, arguments, action)
    for field in dataclasses.fields(settings_class):
        if _is_required(field) and field.name not in values:
            raise ValueError(f"--{field.name} is required: {field.metadata.get('help') or 'see --help'}")
    return typing.cast(T, settings_class(**values))


def given_values(settings_class: type, argv: Sequence[str], action: str = "") -> dict[str, Any]:
    """What a command line gives, by name and of the right type, with the defaults of mappings.

    A mapping in a later ``--config`` is merged into that of an earlier one; ``--key`` overrides every file.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
        FileNotFoundError: a YAML file does not exist.
        SystemExit: ``--help`` or ``--check`` was given, the latter with nothing wrong.
    """
    app, hints = _app(settings_class, action), _hints(settings_class)
    if {"--help", "-h"} & set(argv):
        text = io.StringIO()
        app.help_print([], console=Console(file=text, width=max(120, shutil.get_terminal_size().columns)))
        print(text.getvalue().strip())
        raise SystemExit(0)
    try:
        _, bound, _ = app.parse_args(_tokens(argv, hints), exit_on_error=False, print_error=False)
    except cyclopts.UnknownOptionError as error:
        raise ValueError(_unknown(error.token.keyword or "", hints)) from None
    except cyclopts.CycloptsError as error:
        raise ValueError(str(error.__cause__ or "") or str(error)) from None
    given = dict(bound.arguments)
    values: dict[str, Any] = {}
    for path in given.pop("config", []) if "config" not in hints else []:
        for name, value in _read_yaml(path, hints).items():
            both = isinstance(value, dict) and isinstance(values.get(name), dict)
            values[name] = {**values[name], **value} if both else value
    checks_only = given.pop("check", False)
    if given.pop("debug", False):
        os.environ[DEBUG_VARIABLE] = "1"  # also for the processes that a launcher starts
    mappings = {name: given.pop(name) for name in list(given) if isinstance(given[name], dict)}
    values |= given
    for field in dataclasses.fields(settings_class):
        if get_origin(bare(hints[field.name])) is dict and callable(field.default_factory):
            changes, preset = mappings.get(field.name, {}), field.metadata.get("preset")
            start = preset(values) if preset and changes else field.default_factory()
            values[field.name] = {**values.get(field.name, start), **changes}
    check_limits(settings_class, values)
    if checks_only:
        raise SystemExit(0)
    return values


def convert(key: str, value: Any, hint: Any) -> Any:
    """A value of YAML, or the text of a command line, as the type ``hint``.

    Raises:
        ValueError: it does not fit; the message names the key, the value and what is allowed.
    """
    if hint != bare(hint) and (value is None or (isinstance(value, str) and value.lower() in NONE)):
        return None
    hint = bare(hint)
    if hint is Any:
        return value
    if get_origin(hint) is list:
        items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise ValueError(f"{key} must be a list, not {value!r}")
        return [convert(key, item, get_args(hint)[0]) for item in items]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{key} must be a mapping such as {{task: 1.0}}, not {value!r}")
        return {str(name): convert(f"{key}.{name}", item, get_args(hint)[1]) for name, item in value.items()}
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            allowed = ", ".join(map(str, get_args(hint)))
            raise ValueError(f"{key} is {value!r}{nearest(str(value), map(str, get_args(hint)))}; allowed: {allowed}")
        return value
    wrong = value is None or isinstance(value, (dict, list)) or (isinstance(value, bool) and hint not in (bool, str))
    try:
        if wrong or (hint is int and float(value) != int(float(value))):
            raise ValueError(value)
        return cyclopts.convert(hint, [str(value)])
    except (ValueError, OverflowError, cyclopts.CycloptsError):
        raise ValueError(f"{key} must be {hint.__name__.lower()}, not {value!r}") from None


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the allowed name closest to a misspelt one, else an empty string."""
    match = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def check_limits(settings: Any, values: Mapping[str, Any]) -> None:
    """Refuse numbers outside the limits of their settings, and those that are not finite.

    Args:
        settings: a dataclass, or an instance.
        values: by name of the setting.

    Raises:
        ValueError: the message names the first such setting, its value and what is allowed.
    """
    for field in dataclasses.fields(settings):
        value, limits = values.get(field.name), field.metadata.get("limits")
        if value is None or not limits:
            continue
        if not math.isfinite(value) or not all(LIMITS[name][1](value, bound) for name, bound in limits.items()):
            allowed = " and ".join(f"{LIMITS[name][0]} {bound:g}" for name, bound in limits.items())
            null = ", or null" if "None" in str(field.type) else ""
            raise ValueError(f"--{field.name} is {value}; it must be {allowed}{null}")


def bare(hint: Any) -> Any:
    """``X`` of ``X | None``."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def resolved(settings: Any) -> dict[str, Any]:
    """Settings as plain YAML types, in field order."""
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def save_settings(settings: Any, path: Path) -> None:
    """Write the resolved settings as YAML that ``--config`` reads back."""
    atomic_write_text(path, yaml.safe_dump(resolved(settings), sort_keys=False, allow_unicode=True))


class _Printable(io.TextIOWrapper):
    """Text without the control characters by which data could give orders to a terminal."""

    def write(self, text: str) -> int:
        """See `io.TextIOWrapper`."""
        return super().write(text.translate(CONTROLS))


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Replace control characters in what the block prints: captions, names and ids come from files of others."""
    before = sys.stdout
    if not isinstance(before, io.TextIOWrapper):
        yield
        return
    buffered = before.line_buffering
    sys.stdout = _Printable(before.buffer, before.encoding, before.errors, line_buffering=buffered, write_through=True)
    try:
        yield
    finally:
        sys.stdout.detach()
        sys.stdout = before


@contextlib.contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """Flush what the block prints, and end silently where the reader has gone, as after ``mmkd eval --help | head``.

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
        try:
            print(flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again as it ends
            raise SystemExit(BROKEN_PIPE) from None
        raise


def _app(settings_class: type, action: str) -> App:
    """The command line of a settings class, as cyclopts reads it and prints its help."""
    hints, groups = _hints(settings_class), _groups(settings_class)
    parameters = [
        _parameter(field, hints[field.name], groups[field.name]) for field in dataclasses.fields(settings_class)
    ]
    if "config" not in hints:  # a recipe with a setting of this name means its own file by it
        text = "YAML file, or name of a packaged one; --key value overrides it"
        parameters.append(_option("config", list[str], [], Parameter(help=text, group=COMMON, show_default=False)))
    text = "only check the names and types of the settings"
    parameters.append(_option("check", bool, False, Parameter(help=text, group=COMMON, show_default=False)))
    text = "show the traceback of an error"
    parameters.append(_option("debug", bool, False, Parameter(help=text, group=COMMON, show_default=False)))

    def settings(**_: Any) -> None:
        """Bound by cyclopts, never called."""

    signature = inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))
    settings.__signature__ = signature  # type: ignore[attr-defined]
    app = App(
        name=f"{_program()} {action}".strip(),
        help=_description(settings_class, action),
        help_flags=(),
        version_flags=(),
        help_format="plaintext",
        help_formatter="plain",
        default_parameter=Parameter(negative=(), allow_repeating=True),
    )
    app.default(settings)
    return app


def _hints(settings_class: type) -> dict[str, Any]:
    """The type of every field."""
    hints = typing.get_type_hints(settings_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings_class)}


def _groups(settings_class: type) -> dict[str, Group]:
    """The heading of every field in ``--help``, as the first class that declares it says."""
    headings: dict[str, str] = {}
    for declaring in reversed(settings_class.__mro__):
        own = vars(declaring)
        annotated = own.get("__annotations__", {})
        listed = {name: heading for heading, names in own.get("GROUPS", {}).items() for name in names.split()}
        assert listed.keys() <= annotated.keys(), f"{declaring.__name__}.GROUPS: {listed.keys() - annotated.keys()}"
        for name in annotated:
            headings.setdefault(name, listed.get(name, own.get("GROUP", "settings")))
    places = {heading: place for place, heading in enumerate(GROUPS)}
    return {name: Group(heading, sort_key=places.get(heading, 1)) for name, heading in headings.items()}


def _description(settings_class: type, action: str = "") -> str:
    """The docstring of a settings class with one example: the first of those for the command that runs."""
    text, heading, examples = inspect.cleandoc(settings_class.__doc__ or "").partition(f"\n{EXAMPLE}\n")
    lines = [line.strip() for line in examples.splitlines()]
    own = [line for line in lines if f"{line} ".startswith(f"{_program()} {action}".strip() + " ")]
    return f"{text.strip()}\n\n{EXAMPLE} {(own or lines)[0]}" if heading else text


def _parameter(field: dataclasses.Field[Any], hint: Any, group: Group) -> inspect.Parameter:
    """A setting as cyclopts sees it: optional, since a file may give it."""

    def read(_: Any, tokens: Sequence[Token]) -> Any:
        texts = [token.value for token in tokens]
        if get_origin(bare(hint)) is not list:
            return convert(field.name, texts[-1], hint)
        whole = field.metadata.get("whole") and tokens[0].keyword is None
        return convert(field.name, texts if whole else ",".join(texts), hint)

    required, kind = _is_required(field), bare(hint)
    meaning = Parameter(
        help=field.metadata.get("help") or None,
        group=REQUIRED if required else group,
        show_default=False if required else _shown,
        converter=None if kind is bool or get_origin(kind) is dict else read,
    )
    default = None if required else field.default_factory() if callable(field.default_factory) else field.default
    stated = hint | None if default is None else hint  # cyclopts checks defaults where pydantic is loaded
    return _option(field.name, stated, default, meaning, bool(field.metadata.get("positional")))


def _option(name: str, hint: Any, default: Any, meaning: Parameter, positional: bool = False) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
    names = (f"--{name}", f"-{name}") if len(name) == 1 else (f"--{name}",)
    named = Parameter(name=names, n_tokens=None if meaning.converter is None else 1)
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[hint, meaning, named])


def _tokens(argv: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """The arguments with ``--flag false`` as ``--flag=false``, since a flag of cyclopts takes no word after it."""
    tokens: list[str] = []
    for argument in argv:
        previous = tokens[-1] if tokens else ""
        is_flag = previous.startswith("--") and hints.get(previous[2:].replace("-", "_")) in (bool, bool | None)
        if is_flag and argument.lower() in BOOLEANS:
            tokens[-1] = f"{previous}={argument}"
        else:
            tokens.append(argument)
    return tokens


def _read_yaml(path: Path | str, hints: Mapping[str, Any]) -> dict[str, Any]:
    path = _packaged(Path(path))
    loaded = read_yaml(path) or {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold `key: value` lines, not a {type(loaded).__name__}")
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise ValueError(f"{path}: {_unknown(str(key), hints)}")
        try:
            values[name] = convert(name, value, hints[name])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return values


def _packaged(path: Path) -> Path:
    """The file, or the one of this name that comes with the package, such as ``distill_paper``."""
    if path.is_file():
        return path
    presets = Path(str(importlib.resources.files("mmkd.train.configs")))
    known = sorted(file.stem for file in presets.glob("*.yaml") if not file.stem.startswith("accelerate_"))
    if str(path) in known:
        return presets / f"{path}.yaml"
    raise FileNotFoundError(f"--config {path}: no such file{nearest(str(path), known)}; packaged: {', '.join(known)}")


def _action(command: Command, argv: list[str]) -> tuple[type, list[str], str]:
    """The settings class, its arguments and, where a command has several actions, the one that comes first."""
    if not isinstance(command, Mapping):
        return command, argv, ""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        described = {action: _description(settings_class, action) for action, settings_class in command.items()}
        print(f"usage: {_program()} ACTION [--key value ...]\n")
        print(next(text for text in described.values()).splitlines()[-1], end="\n\n")
        for action, text in described.items():
            print(f"  {action:<10}{text.splitlines()[0]}")
        raise SystemExit(0)
    if name not in command:
        raise ValueError(f"unknown action {name!r}{nearest(name, command)}; allowed: {', '.join(command)}")
    return command[name], argv[1:], name


def _from_process(read: Callable[[], T]) -> T:
    """What ``read`` makes of the arguments of this process; wrong ones end it."""
    try:
        with ignore_broken_pipe():
            return read()
    except (ValueError, OSError) as error:
        fail(2, str(error))


def fail(code: int, message: str, program: str = "") -> NoReturn:
    """End with an exit code and one line on standard error.

    Raises:
        SystemExit: with the code.
    """
    print(f"{program or _program()}: error: {message.translate(CONTROLS)}", file=sys.stderr)
    raise SystemExit(code)


def _program() -> str:
    """``mmkd NAME``, whether started by `mmkd`, which gives the name, or with ``-m``."""
    return f"mmkd {os.environ.get(COMMAND_VARIABLE) or Path(sys.argv[0]).stem.removeprefix('mmkd ')}"


def _message(error: Exception, outputs: Sequence[Path]) -> str:
    """An error of the operating system as ``FILE: what is wrong``, one that is meant for the user as it is.

    The system does not say where the disk is full; where no writer knows it, the outputs stand there.
    """
    if isinstance(error, OSError) and error.strerror:
        is_full = error.errno == errno.ENOSPC
        where = error.filename or (", ".join(map(str, outputs)) if is_full else "")
        return f"{where}{': ' if where else ''}{error.strerror}{'; free some and try again' if is_full else ''}"
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        return str(error)
    told, read = " ".join(str(error).split()), files_read()
    read = f" (perhaps of {read}, which may be damaged)" if read else ""
    return f"{type(error).__name__}: {told}{read}; this was not expected: --debug shows where it happened"


def _unknown(key: str, hints: Mapping[str, Any]) -> str:
    near = nearest(key.lstrip("-").replace("-", "_"), hints)
    return f"unknown setting {key}{near}; allowed: {', '.join(sorted(hints))}"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _shown(default: Any) -> str:
    """A default as one would type it."""
    plain = _plain(default)
    if isinstance(plain, list):
        return ",".join(map(str, plain)) or "empty"
    if isinstance(plain, dict):
        return ", ".join(f"{name}: {value}" for name, value in plain.items()) or "empty"
    if isinstance(plain, bool):
        return str(plain).lower()
    return "null" if plain is None else str(plain) or "empty"


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
