#!/usr/bin/env bash
# Checks of this device against a CPU, and its speed: sized for eight minutes on one GPU; the last line is JSON.
# bash tests/device/run.sh [--cpu] [--output FILE]
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="tests/support:${PYTHONPATH:-}"
exec python tests/device/checks.py "$@"
