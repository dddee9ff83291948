"""The text of a comparison, and its version.

The order serves the prefix cache: all comparisons of a prompt share the text up to the first image, all opponents of
one first image share everything up to the second image.
"""

import hashlib
import json
from typing import Any, Literal

Form = Literal["choice", "scores"]

SYSTEM = "You compare two images the way people do."
CRITERION = (
    "People prefer the image that shows what the prompt asks for. If both do, they prefer the better looking one."
)
QUESTIONS: dict[Form, str] = {
    "choice": (
        "Which image do people prefer? "
        "Write your reasons between <think> and </think>, then 1 or 2 between <answer> and </answer>."
    ),
    "scores": (
        "How good is each image? "
        "Write your reasons between <think> and </think>, "
        "then two scores from 0 to 10, image 1 first, between <answer> and </answer>."
    ),
}
ANSWER_OPEN = "<answer>"
CLOSING = "</think><answer>"
"""Appended to a completion that ran out of tokens, so that it still answers."""
NO_THINKING = "<think></think><answer>"
"""Begins the completion of a judge that answers without thinking."""
USER_TEXT = "\ue000"
"""The place of the user's text, filled after the chat template runs, so that the text stays plain."""


def comparison_messages(form: Form, own_criterion: bool = False) -> list[dict[str, Any]]:
    """The chat of one comparison, with two images and USER_TEXT in the place of the prompt.

    With `own_criterion` USER_TEXT stands in the place of the criterion, too; see `user_text`.
    """
    words = USER_TEXT if own_criterion else f" {CRITERION}\nPrompt:{USER_TEXT}"
    return [
        {"role": "system", "content": SYSTEM},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": f"Criterion:{words}\nImage 1: "},
                {"type": "image"},
                {"type": "text", "text": "\nImage 2: "},
                {"type": "image"},
                {"type": "text", "text": f"\n{QUESTIONS[form]}"},
            ],
        },
    ]


def user_text(prompt: str, criterion: str = "") -> str:
    """The text for USER_TEXT: a prompt, or the user's own criterion and a prompt, if there is one."""
    prompt, criterion = prompt.strip(), criterion.strip()
    if not criterion:
        return f" {prompt}"
    return f" {criterion}\nPrompt: {prompt}" if prompt else f" {criterion}"


def template_version(criterion: str = "") -> str:
    """A short hash of every word above, and of the user's own criterion; stored with calibrations and results.

    Adapters have it, too, without a criterion.
    """
    own = [criterion.strip()] if criterion else []
    chats = [comparison_messages(form, bool(own)) for form in QUESTIONS]
    words = [*chats, CLOSING, NO_THINKING, *own]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:12]
