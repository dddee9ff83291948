"""The part of Qwen's real vocabulary that the tests carry, as a tokenizer of transformers."""

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent.parent / "golden"
IDS = GOLDEN / "profiles" / "ids.npz"
VOCABULARY = GOLDEN / "profiles" / "vocabulary" / "tokenizer.json"
REASONS = ("<think>", "</think>")
"""The tokens that Qwen3 has and Qwen2.5 has not."""


@cache
def real_tokenizer(thinks: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of Qwen3, or that of Qwen2.5, which has no token `<think>`; see scripts/make_profile_golden.py."""
    description = json.loads(VOCABULARY.read_text(encoding="utf-8"))
    if not thinks:
        added = description["added_tokens"]
        description["added_tokens"] = [token for token in added if token["content"] not in REASONS]
    template = json.loads((GOLDEN / "qwen3_vl" / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, eos_token="<|im_end|>")
