"""Checkpoints beside transformers: the same pictures and words must give the same logits at every position.

Skipped without torch. To run it with torch in an environment of its own:

    MLXPREF_REFERENCE_PYTHON=venv-torch/bin/python python -m pytest -m reference tests/engine/test_reference.py
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlxpref
from convert.parity import compare
from mlxpref.checkpoints.names import hub_name, mlx_name
from mlxpref.conversion.export import export_adapter
from mlxpref.demo import JUDGE
from mlxpref.engine.adapters import load_adapter
from mlxpref.errors import ModelError
from tests.conftest import FAMILIES, GOLDEN, picture, tiny_model, write_adapter
from tests.variants import leave_out_defaults, read_weights, write_transformers_5, write_weights

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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_without_defaults_equals_transformers(family: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / family, tmp_path / "model", ignore=shutil.ignore_patterns("*.npz")))
    assert leave_out_defaults(folder)
    assert compare(folder, CHOSEN_PYTHON or sys.executable)["largest_logit_difference"] < 1e-4


WRITE_PEFT = """
import sys, torch, transformers
from peft import LoraConfig, get_peft_model
folder, place, *starts = sys.argv[1:]
for start in starts:
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    value = {"true": True, "false": False}.get(start, start)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=value, use_rslora=start == "false",
                        target_modules=r".*language_model.*\\.(q_proj|v_proj|down_proj)")
    model = get_peft_model(model, config)
    model.save_pretrained(f"{place}/{start}-start")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(f"{place}/{start}")
    if start in ("pissa", "olora"):
        model.peft_config["default"].init_lora_weights = True
        start = f"{place}/{start}"
        model.save_pretrained(f"{start}-plain", path_initial_model_for_weight_conversion=f"{start}-start")
"""


def test_adapters_that_peft_wrote(tmp_path: Path) -> None:
    """What we put on computes what PEFT computes; what changed its base we refuse, and read once PEFT converted it."""
    python, family = CHOSEN_PYTHON or sys.executable, "qwen2_5_vl"
    plain, changed = ["true", "false", "gaussian", "orthogonal"], ["pissa", "olora"]
    command = [python, "-c", WRITE_PEFT, str(GOLDEN / family), str(tmp_path), *plain, *changed]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    for name in [*plain, *(f"{start}-plain" for start in changed)]:
        report = compare(GOLDEN / family, python, tmp_path / name)
        assert report["largest_logit_difference"] < 1e-4, name
    for name in changed:
        with pytest.raises(ModelError, match="path_initial_model_for_weight_conversion"):
            load_adapter(tiny_model(family).model, tmp_path / name)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_spellings_equal_transformers(family: str, tmp_path: Path) -> None:
    """The names that transformers gives since 4.52, and leftovers, in a folder that transformers reads, too."""
    folder = Path(shutil.copytree(GOLDEN / family, tmp_path / "model", ignore=shutil.ignore_patterns("*.npz")))
    weights = {hub_name(mlx_name(name)): array for name, array in read_weights(folder).items()}
    write_weights(folder, weights | {"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones((4,))})
    report = compare(folder, CHOSEN_PYTHON or sys.executable)
    assert report["largest_logit_difference"] < 1e-4


PROCESSOR = """
import transformers
class AutoProcessor:
    # transformers' own asks for torchvision, for videos
    @classmethod
    def from_pretrained(cls, folder):
        self = cls()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.apply_chat_template = self.tokenizer.apply_chat_template
        return self
    def __call__(self, text, images, return_tensors):
        features = dict(self.images(images=images, return_tensors="pt"))
        first, second, rest = text[0].split("<|image_pad|>")
        pads = ["<|image_pad|>" * (int(g.prod()) // self.images.merge_size**2) for g in features["image_grid_thw"]]
        ids = self.tokenizer(first + pads[0] + second + pads[1] + rest, return_tensors="pt")["input_ids"]
        kinds = (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        return {"input_ids": ids, "mm_token_type_ids": kinds, **features}
"""


@pytest.mark.parametrize("to", ["peft", "hf"])
def test_the_model_cards_code_says_what_the_judge_says(to: str, tmp_path: Path) -> None:
    """The code of an export's README.md, run as it stands but for names of files, beside the judge's own answer."""
    base = GOLDEN / "qwen2_5_vl"
    ours = write_adapter(tmp_path / "ours", tiny_model("qwen2_5_vl"))
    export_adapter(ours, tmp_path / to, to, base, str(base), dtype="float32")
    for number in (1, 2):
        picture(number, (84, 84)).save(tmp_path / f"{number}.png")
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / to / "README.md").read_text(), re.DOTALL)
    code = "\n".join(blocks).replace("PATH", str(tmp_path / to)).replace("PROMPT", "a red circle")
    code = code.replace('"qwen2_5_vl"', repr(str(base)))  # a card names no place on this machine
    assert ", AutoProcessor\n" in code
    code = PROCESSOR + code.replace(", AutoProcessor\n", "\n")
    command = [CHOSEN_PYTHON or sys.executable, "-c", code]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    judge = mlxpref.load(base, ours, think=False)
    verdict = judge.compare(tmp_path / "1.png", tmp_path / "2.png", "a red circle").a_shown_first[0]
    tolerance = 1e-3 if to == "hf" else 5e-3  # the base is in bfloat16
    assert float(done.stdout.rpartition(": ")[2]) == pytest.approx(verdict.p_first("soft"), abs=tolerance)
