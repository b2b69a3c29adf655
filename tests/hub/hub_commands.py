"""The command as a user types it, led to the stand-in of the Hub."""

import os
import subprocess
import sys

TOKEN = "hf_writer_token"


def hub_environment(hub, home, token=TOKEN):
    """What leads the Hub's client to the stand-in, and away from this machine's token and cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | own | ({"HF_TOKEN": token} if token else {})


def mmkd(hub, home, *arguments, token=TOKEN):
    """The command as a user types it."""
    command = [sys.executable, "-m", "mmkd.command.cli", *map(str, arguments)]
    return subprocess.run(command, env=hub_environment(hub, home, token), capture_output=True, text=True, timeout=120)
