"""Tests of mlxpref. What the user has set or downloaded does not decide one, and none reaches the network.

Tests of downloads use a hub on this machine. huggingface_hub reads the environment at its import, hence here.
"""

import os
from pathlib import Path

_FOREIGN = ("HF_", "HUGGING", "MLXPREF_MODEL", "MLXPREF_LONG_RUNS", "MLX_RANK", "MLX_HOSTFILE")
_TERMINAL = ("FORCE_COLOR", "CLICOLOR_FORCE", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS")
for _name in [*os.environ]:
    if _name.startswith((*_FOREIGN, *_TERMINAL)):
        del os.environ[_name]
os.environ["HF_HOME"] = str(Path(__file__).with_name("no-hub-cache"))  # never made
os.environ["HF_HUB_OFFLINE"] = "1"
