"""Make tests/golden/profiles/: the ids that transformers gives for the questions of the built-in profiles.

Not run by the tests. Needs transformers alone, without torch, and for the vocabulary the file of the PyPI package
dashscope 2.0.2:

    pip download --no-deps dashscope==2.0.2 && unzip dashscope-*.whl dashscope/resources/qwen.tiktoken
    python -m scripts.make_profile_golden dashscope/resources/qwen.tiktoken

Nothing of mlxpref's engine runs here: the profiles are read as TOML, the messages are put together anew, the chat
template renders them, and the tokenizer encodes the whole text at once, with one image token for each that an image
takes.

vocabulary/tokenizer.json is a small part of Qwen's real vocabulary (151,643 byte pairs): all merges that are made in
the texts below, so that these become the same tokens as with the whole; this is checked. Ids are counted anew, in the
order of the ranks. ids.npz holds cases, a JSON list of [profile, form, think, criterion, prompt], and for each
tokenizer the ids of all cases in a row with their lengths; texts is a digest of the texts.
"""

import base64
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.engine.profile_texts import COMPLETIONS, HOSTILE, LETTERS, NO_ASCII, PROMPTS, digest
from tests.engine.real_vocabulary import IDS, VOCABULARY, real_tokenizer

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
PROFILES = ROOT / "mlxpref" / "engine" / "profiles"
CHECKPOINTS = {name: GOLDEN / name for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")} | {
    "demo": ROOT / "mlxpref" / "demo" / "judge"
}
IMAGE_TOKENS = (9, 6)
CRITERION = "the sharper eyes"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end"
SPECIAL = [f"<|{name}|>" for name in f"{NAMES} vision_start vision_end vision_pad image_pad video_pad".split()]
FILES = [f"<|{name}|>" for name in ["fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"]]
TOOLS = ["<tool_call>", "</tool_call>", *FILES, "<tool_response>", "</tool_response>"]
NOT_SPECIAL = [*TOOLS, "<think>", "</think>"]
LICENCE = """# A part of Qwen's vocabulary

`tokenizer.json` holds those byte pairs of the vocabulary of Qwen2 and Qwen3 (Alibaba Cloud, Apache License 2.0) that
the texts of the tests need. They come from the file `qwen.tiktoken` of the PyPI package dashscope 2.0.2 (Apache License
2.0) and were changed: most were left out, and the rest was counted anew. `scripts/make_profile_golden.py` makes it.
"""

Case = tuple[str, str, bool, str, str]
Profiles = Mapping[str, Mapping[str, Any]]
Merges = Mapping[bytes, int]
LABELS = ("first", "second", "tie", "tie_opening", "levels")


def question(profile: Mapping[str, Any], case: Case) -> list[dict[str, Any]]:
    """The messages of a case, put together from the profile's file."""
    _, form, _, criterion, prompt = case
    text = str(profile["scores_question" if form == "scores" else "question"])
    if not prompt:
        text = "\n".join(line for line in text.split("\n") if "{prompt}" not in line)
    content: list[dict[str, str]] = []
    for number, part in enumerate(text.split("{image}")):
        if number:
            content.append({"type": "image"})
        pieces = part.split("{prompt}")
        words = [each.replace("{criterion}", criterion or profile.get("criterion", "")) for each in pieces]
        if part:
            content.append({"type": "text", "text": prompt.strip().join(words)})
    system = [{"role": "system", "content": profile["system"]}] if "system" in profile else []
    return [*system, {"role": "user", "content": content}]


def rendered(tokenizer: Any, profile: Mapping[str, Any], case: Case) -> str:
    """The chat of a case."""
    switches = profile.get("chat_template", {})
    messages = question(profile, case)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switches))


def ids_of(tokenizer: Any, profile: Mapping[str, Any], case: Case) -> list[int]:
    """The ids of a case up to the completion, or with the profile's beginning of an answer at once."""
    before, *others = rendered(tokenizer, profile, case).split("<|image_pad|>")
    images = ["<|image_pad|>" * count for count in IMAGE_TOKENS[: len(others)]]
    text = before + "".join(image + other for image, other in zip(images, others, strict=True))
    if case[2] or "tie_opening" in profile:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    at_once = profile.get("at_once") or profile.get("closing") or profile["lead"]
    at_once = at_once.replace("{aspect}", profile.get("aspects", [""])[0])
    label = profile.get("first") or profile["levels"][0]
    ids: list[int]
    *ids, last = tokenizer(text + at_once + label, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([last]) == label
    return ids


def cases(profiles: Profiles) -> list[Case]:
    """All questions: every prompt, with reasons and at once, and all forms of our own profile.

    At once the question is the same, so that few prompts do.
    """
    found: list[Case] = []
    for name, profile in profiles.items():
        thinks = profile.get("thinks", True)
        found += [(name, "choice", True, "", prompt) for prompt in PROMPTS if thinks]
        found += [(name, "choice", False, "", prompt) for prompt in (PROMPTS[:2] if thinks else PROMPTS)]
    found += [("mlxpref", "scores", think, "", prompt) for think in (True, False) for prompt in PROMPTS[:2]]
    return [*found, *(("mlxpref", "choice", True, CRITERION, prompt) for prompt in ("", *PROMPTS[:3]))]


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of all byte sequences of a tiktoken file."""
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def merged(word: bytes, ranks: Merges, below: int = 1 << 30) -> tuple[list[bytes], set[bytes]]:
    """The tokens of a word by the ranks under a bound, and all that were made on the way."""
    parts, made = [word[i : i + 1] for i in range(len(word))], set[bytes]()
    while True:
        found = [(ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)]
        rank, place = min(found, default=(below, 0))
        if rank >= below:
            return parts, made
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        made.add(parts[place])


def build(tokens: Iterable[bytes], ranks: Merges) -> Tokenizer:
    """A tokenizer of these byte sequences in the order of their ranks, with the special tokens of Qwen3 behind them."""
    letters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordered = sorted(tokens, key=ranks.__getitem__)
    pairs = [merged(token, ranks, ranks[token])[0] for token in ordered if len(token) > 1]
    vocabulary = {spelled(token): number for number, token in enumerate(ordered)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(spelled(a), spelled(b)) for a, b in pairs]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in NOT_SPECIAL])
    return tokenizer


def words_of(text: str, tokenizer: Tokenizer) -> set[bytes]:
    """The words that are merged by themselves, with and without `<think>` and the like as tokens of their own."""
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    text = tokenizer.normalizer.normalize_str(text)
    added = "|".join(map(re.escape, [*SPECIAL, *NOT_SPECIAL]))
    parts = [text, *re.split(added, text), *re.split("|".join(map(re.escape, [*SPECIAL, *TOOLS])), text)]
    words = [word for part in parts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(part)]
    return {bytes(letters[letter] for letter in word) for word in words}


def make_vocabulary(ranks: Merges, texts: Sequence[str]) -> Tokenizer:
    """The part of the vocabulary that the texts need, which gives them the tokens of the whole."""
    whole = build(ranks, ranks)
    assert whole.encode("Hello, world").ids == [9707, 11, 1879], "the ids that Qwen's tokenizers give"
    assert [whole.token_to_id(token) for token in ("<|image_pad|>", "<think>")] == [151655, 151667]
    words = set[bytes]().union(*(words_of(text, whole) for text in texts))
    needed = {bytes([byte]) for byte in range(256)}.union(*(merged(word, ranks)[1] for word in words))
    small = build(needed, ranks)
    plain = [Tokenizer.from_str(without_added(each.to_str())) for each in (small, whole)]
    for text in texts:
        assert small.encode(text).tokens == whole.encode(text).tokens, text
        assert plain[0].encode(text).tokens == plain[1].encode(text).tokens, text
    return small


def without_added(description: str) -> str:
    """A tokenizer's description without its added tokens."""
    return json.dumps(json.loads(description) | {"added_tokens": []})


def texts_to_split(profiles: Profiles) -> list[str]:
    """All texts whose tokens the tests look at."""
    chat = AutoTokenizer.from_pretrained(CHECKPOINTS["qwen3_vl"])
    texts = [
        "Hello, world",
        *HOSTILE,
        *LETTERS,
        NO_ASCII,
        *(each.text for written in COMPLETIONS.values() for each in written),
    ]
    for name, profile in profiles.items():
        labels = [label for key in LABELS for label in profile.get(key, [])]
        for case in cases(profiles):
            if case[0] == name:
                texts.append(rendered(chat, profile, case))
        for prompt in HOSTILE:
            texts.append(rendered(chat, profile, (name, "choice", True, "", prompt)))
        leads = [profile.get(key, "") for key in ("at_once", "closing", "lead")]
        leads += [lead.replace("{aspect}", aspect) for lead in leads for aspect in profile.get("aspects", ())]
        texts += [lead + label for lead in leads for label in labels]
    return list(dict.fromkeys(texts))


@click.command(help="Make the golden ids of profiles, and the part of Qwen's vocabulary; see this file.")
@click.argument("ranks", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(ranks: Path) -> None:
    profiles = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(PROFILES.glob("*.toml"))}
    texts = texts_to_split(profiles)
    folder = VOCABULARY.parent
    folder.mkdir(parents=True, exist_ok=True)
    make_vocabulary(read_ranks(ranks), texts).save(str(VOCABULARY), pretty=False)
    (folder / "README.md").write_text(LICENCE)
    tokenizers = {name: AutoTokenizer.from_pretrained(path) for name, path in CHECKPOINTS.items()}
    tokenizers |= {"qwen2_5": real_tokenizer(thinks=False), "qwen3": real_tokenizer(thinks=True)}
    every = cases(profiles)
    arrays = {"cases": np.array(json.dumps(every)), "texts": np.array(digest())}
    for name, tokenizer in tokenizers.items():
        rows = [ids_of(tokenizer, profiles[case[0]], case) for case in every]
        arrays[f"{name} ids"] = np.array([token for row in rows for token in row], np.uint16)
        arrays[f"{name} lengths"] = np.array([len(row) for row in rows], np.uint16)
    np.savez_compressed(IDS, allow_pickle=False, **arrays)
    click.echo(f"{len(every)} questions of {len(tokenizers)} tokenizers, {IDS.stat().st_size} bytes")
    click.echo(f"{len(texts)} texts, {tokenizers['qwen3'].vocab_size} byte pairs, {VOCABULARY.stat().st_size} bytes")


if __name__ == "__main__":
    main()
