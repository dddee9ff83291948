"""Checkpoints beside transformers: the same pictures and words must give the same logits at every position.

Skipped without torch. To run it with torch in an environment of its own:

    MLXPREF_REFERENCE_PYTHON=venv-torch/bin/python python -m pytest -m reference tests/engine/test_reference.py
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from convert.parity import compare
from mlxpref.conversion.export import export_adapter
from mlxpref.demo import JUDGE
from tests.conftest import FAMILIES, GOLDEN, tiny_model, write_adapter
from tests.variants import write_transformers_5

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


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_5_layout_equals_transformers(family: str, tmp_path: Path) -> None:
    report = compare(write_transformers_5(GOLDEN / family, tmp_path / "v5"), CHOSEN_PYTHON or sys.executable)
    assert report["input_ids_equal"]
    assert report["largest_logit_difference"] < 1e-4
    assert report["same_likeliest_token"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_adapter_equals_peft(family: str, tmp_path: Path) -> None:
    """Ours beside PEFT with the exported adapter, and beside transformers with the model that it was fused into."""
    ours = write_adapter(tmp_path / "ours", tiny_model(family))
    for to in ("peft", "hf"):
        export_adapter(ours, tmp_path / to, to, GOLDEN / family, family, dtype="float32")
    python = CHOSEN_PYTHON or sys.executable
    for report in (
        compare(GOLDEN / family, python, tmp_path / "peft"),
        compare(GOLDEN / family, python, ours, theirs=tmp_path / "hf"),
    ):
        assert report["input_ids_equal"]
        assert report["largest_logit_difference"] < 1e-4
        assert report["same_likeliest_token"] == 1
