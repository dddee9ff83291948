"""The Python of a model card, run with torch and transformers, says what the judge says at once, by every profile.

Skipped without torch. To run it with torch in an environment of its own:

    MLXPREF_REFERENCE_PYTHON=venv-torch/bin/python python -m pytest -m reference tests/conversion/test_card_code.py
"""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxpref.checkpoints.files import PROFILE_FILE
from mlxpref.conversion.export import export_adapter
from mlxpref.engine.profile import built_in_profiles, read_profile
from mlxpref.judge.loading import load_judge
from mlxpref.preferences import Comparison, SingleImage
from tests.conftest import FAMILIES, GOLDEN, picture, tiny_model, write_adapter
from tests.engine.test_reference import CHOSEN_PYTHON, pytestmark  # noqa: F401  skips these, too

TIES = """kind = "pair"
question = "{image}{prompt}{image}"
lead = "so: "
first = "1"
second = "2"
tie = "3"
"""


class StandInProcessor:
    """Transformers' own processor needs torchvision for videos, which no judge sees."""

    def __init__(self, folder: str) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.pictures = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.apply_chat_template = self.tokenizer.apply_chat_template

    def __call__(self, text: list[str], images: list[Any], return_tensors: str) -> dict[str, Any]:
        features = dict(self.pictures(images=images, return_tensors=return_tensors))
        counts = [int(grid.prod()) // self.pictures.merge_size**2 for grid in features["image_grid_thw"]]
        before, *others = text[0].split("<|image_pad|>")
        whole = before + "".join("<|image_pad|>" * n + other for n, other in zip(counts, others, strict=True))
        ids = self.tokenizer(whole, return_tensors=return_tensors)["input_ids"]
        is_image = ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return {"input_ids": ids, "mm_token_type_ids": is_image.int(), **features}


def output_of(card: str, folder: Path, prompt: str, place: Path) -> float:
    """The number that the code in a card prints."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    assert "AutoProcessor.from_pretrained" in code
    assert "PROMPT" in code
    code = code.replace("AutoProcessor.from_pretrained", "StandInProcessor").replace("PROMPT", prompt)
    program = f"from typing import Any\n{inspect.getsource(StandInProcessor)}\n{code}".replace('"PATH"', f'"{folder}"')
    done = subprocess.run(
        [CHOSEN_PYTHON or sys.executable, "-c", program], cwd=place, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.rpartition(": ")[2])


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("qwen2_5_vl", name) for name in (*built_in_profiles(), "ties")),
        *((family, "mlxpref") for family in FAMILIES if family != "qwen2_5_vl"),
    ],
)
def test_the_code_of_a_card_says_what_the_judge_says(family: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "ties.toml").write_text(TIES)
    profile = built_in_profiles().get(name) or read_profile(tmp_path / "ties.toml")
    adapter = write_adapter(tmp_path / "adapter", tiny_model(family))
    (adapter / PROFILE_FILE).write_text(profile.text().replace('"Both"\n', '"B"\n'))  # a token of this vocabulary
    export_adapter(adapter, tmp_path / "out", "hf", GOLDEN / family, "Owner/base", dtype="float32")
    images = picture(1), picture(2, (112, 84))
    for number, image in enumerate(images, 1):
        image.save(tmp_path / f"{number}.png")
    judge = load_judge(str(tmp_path / "out"), settings={"think": False})
    assert judge.profile.name.removesuffix(", changed") == name
    question = SingleImage(images[0], "a hat") if profile.is_point else Comparison(*images, "a hat")
    (verdict,) = next(judge.judgements([question])).verdicts
    said = output_of((tmp_path / "out" / "README.md").read_text(), tmp_path / "out", "a hat", tmp_path)
    # The judge also counts the tokens of a label, or of a tie, that begin with a blank.
    assert said == pytest.approx(verdict.score if profile.is_point else verdict.p_first("soft"), abs=3e-3)
