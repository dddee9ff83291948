"""Reading completions: where the answer stands, what was written there, and which words are reasons.

Pure functions of a profile and a text. While a completion is written, its text is in the alphabet of the tokenizer's
vocabulary, where other characters stand for blanks and for bytes; `alphabet` takes the profile's words there.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from mlxpref.engine.profile import Form, Profile
from mlxpref.text import CONTROL

BLANKS = "ĠĊĉč▁ \n\t\r"
"""Blank characters in text, and in byte-level and sentencepiece vocabularies."""
_BLANK = f"[{BLANKS}]*"
_WORDS = re.compile(r"<[^<>\s]*>|\w+|[^\w\s]")
"""What stays together in the words before an answer: tags, words, and each other character."""
_NUMBER = r"(\d+(?:\.\d+)?)"
_SCORES = re.compile(rf"\s*{_NUMBER}[\s,;/]+{_NUMBER}\s*")


@dataclass(frozen=True)
class Reader:
    """Finds the answers of completions by a profile, in text or in another alphabet."""

    profile: Profile
    alphabet: Callable[[str], str] = str

    def answer_number(self, text: str) -> int | None:
        """Which answer a text leads up to at its very end, from 0; None where none stands there that may count.

        Blanks behind the lead belong to the way there, because a vocabulary may join `>` and a line feed in one token.
        """
        leads = self._leads(text)
        if not leads or text[leads[-1].end() :].strip(BLANKS):
            return None
        number = len(leads) - 1
        return number if number == 0 or self.takes_later_answers else None

    @property
    def takes_later_answers(self) -> bool:
        """Whether an answer behind the first one may count."""
        return self.profile.counts == "last" or self.profile.is_point

    def has_thought(self, text: str) -> bool:
        """Whether the reasons in a text ended with their tag; without tags they never do."""
        end = self.alphabet(self.profile.think_end)
        return bool(end) and end in text

    def is_answered(self, text: str) -> bool:
        """Whether a text goes on behind its answer as far as it needs to be read."""
        place = self.start(text)
        if place is None:
            return False
        answer = text[place:].lstrip(BLANKS)
        return self.alphabet(self.profile.end) in answer if self.profile.end else bool(answer)

    def start(self, text: str) -> int | None:
        """The place in a text where the answer that counts begins; None where there is none."""
        leads = self._leads(text)
        if not leads:
            return None
        return leads[-1 if self.takes_later_answers else 0].end()

    def written(self, text: str, form: Form = "choice") -> float | None:
        """The preference for the first image in the written answer: 1, 0, or 0.5 for a tie; None for no answer."""
        if self.profile.is_point:
            return None
        if self._opens_with_tie(text):
            return 0.5
        if form == "scores":
            scores = self.written_scores(text)
            return None if scores is None else 0.5 * (1 + (scores[0] > scores[1]) - (scores[0] < scores[1]))
        answer = self._answer(text)
        match = self._label.match(answer)
        if match is None:
            return None
        preference, rest = self._preference(match[0]), answer[match.end() :]
        if not self.profile.after and not self.profile.end.startswith(rest.strip()) and self.profile.end:
            return None  # nothing stands between a label and the end, which may be cut off
        # "1 and 2" is no answer; "1 is better than image 2" is one.
        other = self._second_label.match(rest)
        return preference if other is None or self._preference(other[1]) == preference else None

    def written_scores(self, text: str) -> tuple[float, float] | None:
        """The scores from 0 to 10 of the first and the second image in the written answer; None for no such answer."""
        numbers = _SCORES.fullmatch(self._answer(text))
        if numbers is None:
            return None
        first, second = float(numbers.group(1)), float(numbers.group(2))
        return (first, second) if max(first, second) <= 10 and math.isfinite(first + second) else None

    def reasoning(self, text: str) -> str:
        """The words before the answer, or between the tags of reasons, on one line, without control characters."""
        profile = self.profile
        if profile.think_end:
            words = text.partition(profile.think_end)[0].partition(profile.think_begin or "\0")
            reasons = words[2] or words[0]
        elif profile.is_point:
            reasons = text
        elif self._opens_with_tie(text):
            reasons = ""
        else:
            leads = self._leads(text)
            reasons = text[: leads[-1 if self.takes_later_answers else 0].start()] if leads else text
        return " ".join(CONTROL.sub(" ", reasons).split())

    def is_well_formed(self, text: str, form: Form = "choice", think: bool = True) -> bool:
        """Whether a completion has the profile's form: reasons where it was asked to `think`, then one answer.

        A text that ends where its answer would begin is read as if the answer followed.
        """
        profile = self.profile
        if profile.is_point:
            return len(self._leads(text)) == len(profile.aspects)
        if self.answer_number(text) is not None:
            text += (profile.first[0] + profile.after if form == "choice" else "1 2") + profile.end
        if self.written(text, form) is None:
            return False
        if self._opens_with_tie(text):
            return True
        match = self._form.fullmatch(text.strip())
        return match is not None and (not think or bool(match["reasons"].strip()))

    @cached_property
    def _form(self) -> re.Pattern[str]:
        """The form of a whole completion."""
        profile = self.profile
        ends = [profile.end] if profile.end.startswith("<") else []
        tags = [re.escape(each) for each in (profile.think_begin, profile.think_end, *ends) if each]
        reasons = rf"(?P<reasons>(?:(?!{'|'.join([*tags, self._lead.pattern])}).)*)"
        if self.takes_later_answers:
            reasons = "(?P<reasons>.*)"
        tagged = f"{re.escape(profile.think_begin)}{reasons}{re.escape(profile.think_end)}"
        end = re.escape(profile.end)
        answer = f"(?:(?!{end}).)*{end}" if end else ".*"
        rest = ".*" if self.takes_later_answers else r"\s*"
        return re.compile(f"{tagged}{_BLANK}{self._lead.pattern}{answer}{rest}", re.DOTALL)

    @cached_property
    def _lead(self) -> re.Pattern[str]:
        """The words before the answer; between them, and beside what is no letter, there may be any blanks."""
        words = [re.escape(self.alphabet(word)) for word in _WORDS.findall(self.profile.lead)]
        return re.compile(_BLANK.join(words))

    @cached_property
    def _label(self) -> re.Pattern[str]:
        """A written label, as a word."""
        labels = sorted((each for label in self.profile.labels for each in label), key=len, reverse=True)
        return re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, labels))})(?![\w]|\.\d)")

    @cached_property
    def _second_label(self) -> re.Pattern[str]:
        """A label right after another one, which makes both no answer."""
        word = (re.findall(r"\w+", self.profile.lead) or [""])[-1]
        return re.compile(rf"\W*(?:(?i:and|or|vs)\W+)?(?:(?i:{word})\W+)?({self._label.pattern})")

    def _preference(self, label: str) -> float:
        return 1.0 if label in self.profile.first else 0.0 if label in self.profile.second else 0.5

    def _leads(self, text: str) -> list[re.Match[str]]:
        """The places of the profile's lead where answers may stand: behind the reasons, or at the very beginning."""
        start = 0
        if self.profile.think_end:
            end = self.alphabet(self.profile.think_end)
            start = text.find(end)
            if start < 0:
                return []
            start += len(end)
        if not self.profile.thinks:  # its answer begins the completion
            start = len(text) - len(text.lstrip(BLANKS))
            match = self._lead.match(text, start)
            return [match] if match else []
        return list(self._lead.finditer(text, start))

    def _answer(self, text: str) -> str:
        """The written answer up to its end, or that of its line."""
        start = self.start(text)
        if start is None:
            return ""
        return text[start:].strip().partition(self.profile.end or "\n")[0].strip(" *")

    def _opens_with_tie(self, text: str) -> bool:
        words = text.split(maxsplit=1)
        return bool(words) and re.sub(r"\W+$", "", words[0]) in self.profile.tie_opening
