"""``mmkd NAME ...``: the recipes under one command, each the same module that ``accelerate launch -m`` runs.

Recipes that use several processes start through ``accelerate launch`` as soon as one of its options is given
(``mmkd distill --num_processes 8 ...``) or accelerate has been configured on this machine; otherwise the module runs in
one process at once, which is what ``accelerate launch`` would do a few seconds later.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console command."""
    raise SystemExit(f"unknown command {sys.argv[1:2]}")
