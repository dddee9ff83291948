"""Checkpoints beside transformers: the same pictures and words must give the same logits at every position.

Skipped without torch. To run it with torch in an environment of its own:

    MLXPREF_REFERENCE_PYTHON=venv-torch/bin/python python -m pytest -m reference tests/test_reference.py
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from convert.parity import compare
from mlxpref.demo import JUDGE
from tests.conftest import FAMILIES, GOLDEN

CHOSEN_PYTHON = os.environ.get("MLXPREF_REFERENCE_PYTHON")

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(
        CHOSEN_PYTHON is None and importlib.util.find_spec("torch") is None,
        reason="torch is not installed: `pip install --group reference`, or set MLXPREF_REFERENCE_PYTHON",
    ),
]


@pytest.mark.parametrize("folder", [JUDGE, *(GOLDEN / name for name in FAMILIES)], ids=lambda folder: folder.name)
def test_a_checkpoint_equals_transformers(folder: Path) -> None:
    report = compare(folder, CHOSEN_PYTHON or sys.executable)
    assert report["input_ids_equal"]
    assert report["largest_logit_difference"] < 1e-4
    assert report["same_likeliest_token"] == 1
