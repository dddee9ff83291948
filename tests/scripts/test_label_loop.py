"""The whole loop, as a user goes it: answers clicked on the page, learned by `train`, measured by `eval`."""

import json
import random
from pathlib import Path

import pytest

from scripts.label_loop import Rater, labelling, learn, rate, rule_of, write_folder
from tests.browser import Browser


@pytest.mark.slow
def test_clicked_answers_are_learned(tmp_path: Path, browser: Browser) -> None:
    write_folder(tmp_path / "pictures", prompts=10, images=8, seed=0)
    output = tmp_path / "preferences.jsonl"
    options = ("--prompt-from", "sidecar", "--held-out", "0.4", "--json")
    with labelling(tmp_path / "pictures", output, *options) as (address, process, _):
        page = browser.new_page()
        page.goto(address)
        assert rate(page, Rater(rule_of, 0.05, random.Random(0)), 120) == 120
        page.click("#finish")
        page.wait_for_selector("text=Finished.")
        result = json.loads(process.communicate(timeout=300)[0])
        page.context.close()
    assert result["answers"] == 120
    assert result["repeats"]["of"] >= 5
    learned = learn(output, tmp_path / "adapter", "--no-think", "--steps", "12")
    before, after = learned["before"], learned["after"]
    assert 20 <= after["pairs"] == before["pairs"] <= 48, "what measures is the part that was held out"
    assert before["accuracy"] < 0.85
    assert after["accuracy"] > before["accuracy"] + 0.1
    assert before["accuracy_low"] < before["accuracy"] < before["accuracy_high"]
    assert after["accuracy_low"] < after["accuracy"]
    assert learned["others"]["accuracy"] > 0.9, "the rule was learned, not the pictures"
    assert after["human_ceiling"] is None, "one rater is not two people"
