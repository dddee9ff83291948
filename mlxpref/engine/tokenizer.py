"""Text to token ids: the chat of a comparison, with the user's text as plain words, and the answer's labels."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from tokenizers import Tokenizer

from mlxpref.engine.template import ANSWER_OPEN, CLOSING, NO_THINKING, USER_TEXT, Form, comparison_messages, user_text
from mlxpref.errors import ModelError
from mlxpref.text import one_line
from mlxpref.verdict import BLANKS

LABELS = ("1", "2")
"""The judge's answers for the first and for the second image."""
_THINKING = re.compile(r"<think>\s*(?:</think>\s*)?$")
"""The beginning of a completion that a chat template writes itself."""


@dataclass(frozen=True)
class ComparisonTokens:
    """The ids of a comparison around its two images: up to the first, up to the second, and the rest.

    `opening` is the text at its end that belongs to the completion's form, such as `<think>`.
    """

    before_first: tuple[int, ...]
    before_second: tuple[int, ...]
    after: tuple[int, ...]
    opening: str = ""


class ComparisonTokenizer:
    """A checkpoint's tokenizer that encodes a prompt only as plain words.

    The template's text gets the tokenizer's usual encoding. A user's text gets the same vocabulary without added
    tokens, special or not, so that `<|im_end|>` or `<think>` in a prompt stays a string of ordinary characters.
    `hf_tokenizer` is the tokenizer of transformers.
    """

    def __init__(self, hf_tokenizer: Any, image_token_id: int) -> None:
        self.hf_tokenizer = hf_tokenizer
        self.image_token = str(hf_tokenizer.convert_ids_to_tokens(image_token_id))
        self._backend: Tokenizer = hf_tokenizer.backend_tokenizer
        self._template_ids = cache(self._encode_template)

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """The ids of every added token; none of them may arise from the user's text."""
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same vocabulary without its added tokens."""
        description = json.loads(self._backend.to_str())
        description["added_tokens"] = []
        description["post_processor"] = None
        return Tokenizer.from_str(json.dumps(description))

    @cached_property
    def vocabulary(self) -> list[str]:
        """Every token by id, as in the vocabulary; ASCII characters stand for themselves."""
        size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        return [token or "" for token in self.hf_tokenizer.convert_ids_to_tokens(list(range(size)))]

    @cached_property
    def label_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids of each label's variants: the digit alone or after blanks; ModelError where there are none."""
        first, second = (
            tuple(i for i, token in enumerate(self.vocabulary) if token.strip(BLANKS) == label) for label in LABELS
        )
        if not first or not second:
            raise ModelError("the tokenizer has no single token for the answers 1 and 2; choose another checkpoint")
        return first, second

    @cached_property
    def blank_ids(self) -> frozenset[int]:
        """The ids of tokens of blanks alone."""
        return frozenset(i for i, token in enumerate(self.vocabulary) if token and not token.strip(BLANKS))

    @cached_property
    def no_thinking_ids(self) -> tuple[int, ...]:
        """The tokens that take a comparison to its answer without thinking."""
        return self.encode_template_text(self._template_ids("choice", False)[2])

    def encode_template_text(self, text: str) -> tuple[int, ...]:
        """Ids of our own text, with added tokens."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_user_text(self, text: str) -> tuple[int, ...]:
        """Ids of a user's text, without added tokens."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no character
        ids = tuple(self._plain.encode(text, add_special_tokens=False).ids)
        if self.added_ids.isdisjoint(ids):
            return ids
        # A vocabulary may hold an added token as an ordinary entry, too: single characters cannot form it.
        ids = tuple(i for character in text for i in self._plain.encode(character, add_special_tokens=False).ids)
        return tuple(i for i in ids if i not in self.added_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of completion tokens; special tokens are left out."""
        return str(self.hf_tokenizer.decode(list(ids), skip_special_tokens=True))

    def comparison(self, prompt: str, form: Form, think: bool, criterion: str = "") -> ComparisonTokens:
        """The ids of a comparison up to the judge's reasons or, without thinking, its answer.

        `criterion` is the user's own; without a prompt it stands alone. Raises ModelError for a checkpoint whose chat
        template cannot be used.
        """
        (before_text, after_text, between, after), opening, no_thinking = self._template_ids(form, bool(criterion))
        return ComparisonTokens(
            before_text + self.encode_user_text(user_text(prompt, criterion)) + after_text,
            between,
            after if think else after + self.no_thinking_ids,
            opening if think else opening + no_thinking,
        )

    def _encode_template(self, form: Form, own_criterion: bool) -> tuple[tuple[tuple[int, ...], ...], str, str]:
        """The ids of the chat template's own text in a form, split at the user's text and at the two images.

        With the completion's beginning in this text, and with what takes it to the answer without thinking. Some
        templates of models that think end in `<think>`, and some that also answer at once in `<think></think>`: the
        latter is left out, as it would forbid to think.
        """
        messages = comparison_messages(form, own_criterion)
        try:
            text = self.hf_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, which may raise anything
            raise ModelError(
                f"the checkpoint's chat template cannot be used: {one_line(error)}; copy the original checkpoint's"
            ) from error
        parts = text.split(self.image_token)
        if len(parts) != 3 or parts[0].count(USER_TEXT) != 1:
            raise ModelError(
                "the checkpoint's chat template does not keep two images and the prompt in their places; "
                "mlxpref needs the Instruct version of the model"
            )
        before_text, after_text = parts[0].split(USER_TEXT)
        after, opening, no_thinking = parts[2], "", NO_THINKING
        if own := _THINKING.search(after):
            if "</think>" in own[0]:
                after, no_thinking = after[: own.start()], own[0] + ANSWER_OPEN
            else:
                opening, no_thinking = own[0], CLOSING
        ids = tuple(self.encode_template_text(part) for part in (before_text, after_text, parts[1], after))
        return ids, opening, no_thinking
