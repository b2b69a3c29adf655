"""Commands with several actions, as ``mmkd pairs ls`` and ``mmkd pairs verify``, each with settings of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from mmkd.settings import help_text, nearest, run

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
