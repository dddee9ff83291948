"""What image generators put into prompts for themselves (LoRAs, weights, schedules) and no judge should read."""

import re

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_INSIDE = r"([^()\[\]]*?)"
_DEPTH = 8
# Innermost brackets first, as often as brackets may stand in brackets.
_MARKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"<\w+:[^<>]*>"), " "),  # <lora:name:0.8>, <hypernet:...>, <segment:...>
    (re.compile(rf"\({_INSIDE}(?<![\d\s])\s*:\s*{_NUMBER}\s*\)"), r"\1"),  # (word:1.2), but not (ratio 16:9)
    (re.compile(rf"\({_INSIDE}\)(?:\d*\.\d+|\++|-+(?![\w ]))"), r"\1"),  # InvokeAI's (word)1.2 and (word)++
    (re.compile(rf"\({{2,}}{_INSIDE}\){{2,}}"), r"\1"),
    (re.compile(rf"\[{{2,}}{_INSIDE}\]{{2,}}"), r"\1"),
    (re.compile(rf"\[(?:[^\[\]:|]*:)?([^\[\]:|]+):\s*{_NUMBER}\s*\]"), r"\1"),  # [from:to:when], [to:when]
    (re.compile(rf"\[([^\[\]:|]+)::\s*{_NUMBER}\s*\]"), r"\1"),  # [from::when]
    (re.compile(r"\{\{+([^{}]*)\}\}+"), r"\1"),  # NovelAI's {{word}} and 1.2::word::
    (re.compile(rf"(?<![\w:]){_NUMBER}::(.*?)::"), r"\1"),
    (re.compile(r"\s*\bBREAK\b\s*"), ", "),
)
_STRAY_COMMAS = re.compile(r"\s*,(?:\s*,)+")
_ESCAPED = {r"\(": "\ue000", r"\)": "\ue001", r"\[": "\ue002", r"\]": "\ue003"}


def plain_prompt(prompt: str) -> str:
    """A prompt as a person would say it: without LoRAs and other tags, weights, schedules and BREAK.

    The words stay: of a schedule those that come last. A prompt without such marks is not changed at all. Single
    brackets stay, as prompts in plain language have them, too.
    """
    text = prompt
    for escaped, stand_in in _ESCAPED.items():
        text = text.replace(escaped, stand_in)
    for _ in range(_DEPTH):
        for pattern, replacement in _MARKS:
            text = pattern.sub(replacement, text)
    for escaped, stand_in in _ESCAPED.items():
        text = text.replace(stand_in, escaped[1])
    if text == prompt:
        return prompt
    lines = (re.sub(r"[ \t]+", " ", line).strip(" ,") for line in _STRAY_COMMAS.sub(",", text).split("\n"))
    return "\n".join(lines).replace(" ,", ",").strip()
