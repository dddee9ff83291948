"""Text to token ids: the chat of a comparison by a profile, with the user's text as plain words, and its labels."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer

from mlxpref.engine.profile import CRITERION_SLOT, PROMPT_SLOT, Form, Profile
from mlxpref.engine.reading import BLANKS, Reader
from mlxpref.errors import ConfigError, ModelError
from mlxpref.text import one_line

_THOUGHT = "<think>"
"""What templates of models that think by themselves end in."""
_Pieces = tuple[int | str, ...]
"""A text of the chat: ids, and the runs of plain text with a place for the user's words."""


@dataclass(frozen=True)
class ComparisonTokens:
    """The ids of a comparison around its images: before the first, between two, and after the last.

    `opening` is the text at its end that belongs to the completion's form, such as `<think>`.
    """

    texts: tuple[tuple[int, ...], ...]
    opening: str = ""


@dataclass(frozen=True)
class _Chat:
    """The chat template's own text around the images, and the completion's beginning in it.

    `at_once` are the ids, and the text, that take it to the answer without reasons.
    """

    texts: tuple[_Pieces, ...]
    opening: str
    at_once: tuple[tuple[int, ...], str]


class ComparisonTokenizer:
    """A checkpoint's tokenizer that asks by a profile and encodes a user's text only as plain words.

    The ids are those that the tokenizer gives for the whole chat, but no added token, special or not, arises from a
    user's text: `<|im_end|>` or `<think>` in a prompt stays a string of ordinary characters. `hf_tokenizer` is the
    tokenizer of transformers.
    """

    def __init__(self, hf_tokenizer: Any, image_token_id: int, profile: Profile) -> None:
        self.hf_tokenizer, self.profile = hf_tokenizer, profile
        self.image_token = str(hf_tokenizer.convert_ids_to_tokens(image_token_id))
        self._backend: Tokenizer = hf_tokenizer.backend_tokenizer
        self._chat = cache(self._encode_chat)
        self.closing_ids = cache(self._closing_ids)
        self.reader = Reader(profile)

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
    def label_ids(self) -> tuple[tuple[int, ...], ...]:
        """The ids of each label's variants, alone or after blanks: first, second and perhaps tie, or the levels.

        ConfigError for a label that is no single token.
        """
        labels = tuple(self._ids_of(label) for label in self.profile.labels)
        missing = [label[0] for label, ids in zip(self.profile.labels, labels, strict=True) if not ids]
        if self.profile.tie_opening and not self.tie_opening_ids:
            missing.append(self.profile.tie_opening[0])
        if missing:
            raise ConfigError(
                f"profile {self.profile.name}: {', '.join(map(repr, missing))} is no single token of this judge's "
                "tokenizer, so its probability cannot be read; take other labels, or another profile"
            )
        return labels

    @cached_property
    def tie_opening_ids(self) -> tuple[int, ...]:
        """The ids that begin a tie in place of the profile's lead, if any."""
        return self._ids_of(self.profile.tie_opening)

    def _ids_of(self, words: Sequence[str]) -> tuple[int, ...]:
        """The ids of the tokens that are one of these words, blanks aside."""
        written = {self.in_alphabet(word) for word in words}
        return tuple(i for i, token in enumerate(self.vocabulary) if token.strip(BLANKS) in written)

    @cached_property
    def streaming_reader(self) -> Reader:
        """The reader of completions in the vocabulary's alphabet."""
        return Reader(self.profile, self.in_alphabet)

    def in_alphabet(self, text: str) -> str:
        """A text in the alphabet of a byte-level vocabulary, where each byte is a character."""
        return "".join(self._bytes[byte] for byte in text.encode())

    @cached_property
    def _bytes(self) -> Mapping[int, str]:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        table: dict[int, str] = bytes_to_unicode()
        return table

    @cached_property
    def blank_ids(self) -> frozenset[int]:
        """The ids of tokens of blanks alone."""
        return frozenset(i for i, token in enumerate(self.vocabulary) if token and not token.strip(BLANKS))

    @cached_property
    def at_once_ids(self) -> tuple[int, ...]:
        """The tokens that take a comparison to its answer without reasons; none if a tie may come before."""
        return self._chat("choice", False, True).at_once[0]

    @cached_property
    def lead_ids(self) -> tuple[int, ...]:
        """The tokens between a comparison and its answer where a tie may come before them; else none."""
        return self.closing_ids(False) if self.profile.tie_opening else ()

    def encode_template_text(self, text: str) -> tuple[int, ...]:
        """Ids of our own text, with added tokens."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_user_text(self, text: str) -> tuple[int, ...]:
        """Ids of a user's text, also among plain words of ours, without added tokens."""
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
        template cannot be used, ConfigError for what the profile cannot ask.
        """
        prompt, criterion = prompt.strip(), criterion.strip()
        chat = self._chat(form, bool(criterion), bool(prompt))
        texts = [self._fill(pieces, prompt, criterion) for pieces in chat.texts]
        if think:
            return ComparisonTokens(tuple(texts), chat.opening)
        ids, text = chat.at_once
        return ComparisonTokens((*texts[:-1], texts[-1] + ids), chat.opening + text)

    def _fill(self, pieces: _Pieces, prompt: str, criterion: str) -> tuple[int, ...]:
        """The ids of a part of the chat with the user's words in their places."""
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:  # the prompt may hold a slot's character
                parts = [part.replace(CRITERION_SLOT, criterion) for part in piece.split(PROMPT_SLOT)]
                ids += self.encode_user_text(prompt.join(parts))
        return tuple(ids)

    def _encode_chat(self, form: Form, own_criterion: bool, has_prompt: bool) -> _Chat:
        """The chat of a form, rendered by the chat template.

        Some templates of models that think end in `<think>`, and some that also answer at once in `<think></think>`:
        the latter is left out, as it would forbid to think, unless the profile switches thinking off itself.
        """
        profile = self.profile
        profile.check_form(form)
        messages = profile.messages(form, own_criterion, has_prompt)
        try:
            text = self.hf_tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **profile.chat_template
            )
        except Exception as error:  # a template is a program, which may raise anything
            raise ModelError(
                f"the checkpoint's chat template cannot be used: {one_line(error)}; copy the original checkpoint's"
            ) from error
        parts = text.split(self.image_token)
        slots = sum(each["text"].count(PROMPT_SLOT) for each in messages[-1]["content"] if each["type"] == "text")
        if len(parts) != profile.images + 1 or text.count(PROMPT_SLOT) != slots:
            images = "two images" if profile.images == 2 else "the image"
            raise ModelError(
                f"the checkpoint's chat template does not keep {images} and the prompt in their places; "
                "mlxpref needs the Instruct version of the model"
            )
        parts[-1], opening, at_once = self._completion_start(parts[-1])
        ids = () if profile.tie_opening else self._led_ids(at_once)
        texts = tuple(self._split(part) for part in parts)
        return _Chat(texts, opening, (ids, "" if profile.tie_opening else at_once))

    def _completion_start(self, after: str) -> tuple[str, str, str]:
        """The chat's end, the completion's beginning in it, and what leads to the answer without reasons from there."""
        profile, at_once = self.profile, self.profile.closings(at_once=True)[0]
        begin, end = profile.think_begin, profile.think_end
        rest = after.rstrip()
        if not begin:
            if rest.endswith(_THOUGHT):
                raise ConfigError(
                    f"profile {profile.name}: the judge's chat template begins a thought ({_THOUGHT}), and the profile "
                    "has none: write chat_template = { enable_thinking = false } into it"
                )
            return after, "", at_once
        if rest.endswith(begin):
            return after, after[len(rest) - len(begin) :], profile.closings()[0]
        if rest.endswith(end) and "enable_thinking" not in profile.chat_template:
            before = rest.removesuffix(end).rstrip()
            if before.endswith(begin):
                start = len(before) - len(begin)
                return after[:start], "", after[start:] + at_once[at_once.index(end) + len(end) :].lstrip()
        return after, "", at_once

    def _closing_ids(self, has_thought: bool, number: int = 0) -> tuple[int, ...]:
        """The tokens that lead to an answer: from reasons, which may have ended, or to the aspect of a number."""
        closing = self.profile.closings()[number]
        if has_thought:
            closing = closing[closing.index(self.profile.think_end) + len(self.profile.think_end) :]
        return self._led_ids(closing)

    def _led_ids(self, text: str) -> tuple[int, ...]:
        """The ids of our own text before an answer: those that it has whatever label follows."""
        one, other = (self.encode_template_text(text + label[0]) for label in self.profile.labels[:2])
        same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        return tuple(token for token, _ in same)

    def _split(self, text: str) -> _Pieces:
        """A part of the chat as ids, and as the runs between added tokens that have a place for the user's words."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        pieces: list[int | str] = []
        start = 0
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self.added_ids:
                pieces += self._run(text[start:begin])
                pieces.append(token)
                start = end
        return (*pieces, *self._run(text[start:]))

    def _run(self, text: str) -> Sequence[int | str]:
        """A run of plain text: its ids, or itself where it has a place for the user's words."""
        if PROMPT_SLOT in text or CRITERION_SLOT in text:
            return [text]
        return self.encode_template_text(text) if text else []
