"""Profiles: how a judge is asked and how its answer is read, as data in a TOML file.

Our own way to ask is one of the built-in profiles and goes through the same code as those of other judges.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mlxpref.checkpoints.files import PROFILE_FILE
from mlxpref.errors import ConfigError
from mlxpref.text import one_line

Form = Literal["choice", "scores"]
"""The question of a comparison: which image is better, or a score from 0 to 10 for each."""
OWN = "mlxpref"
"""The name of our own profile."""
PROMPT_SLOT, CRITERION_SLOT = "\ue000", "\ue001"
"""The places of the user's texts in a chat; they are filled after the chat template runs, so that they stay plain."""
_IMAGE, _PROMPT, _CRITERION, _ASPECT = "{image}", "{prompt}", "{criterion}", "{aspect}"
_PROMPT_LINE = re.compile(r"^.*\{prompt\}.*(?:\n|\Z)", re.MULTILINE)
_KINDS: Mapping[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number from 0"),
    str: (str, "a text"),
}
_BYTES = 4
"""Bytes of text a token has at least, about, in the vocabularies of large models."""
_PROMPT_TOKENS, _TEMPLATE_TOKENS, _TURN_TOKENS = 82, 20, 3
"""Room for a prompt, and about how many tokens a chat template adds, of these behind the user's turn."""
_UNASKED = ("name", "note", "models", "max_tokens", "path", "source")
"""Fields that change nothing in what is asked and read."""
_SWITCHES = ("tokenize", "add_generation_prompt", "return_dict", "return_tensors", "conversation", "chat_template")
"""Arguments of transformers that are no switches of a chat template."""


@dataclass(frozen=True)
class Profile:
    """How a judge is asked, how it answers, and how the answer is read; the built-in files explain every field.

    `kind` "pair" shows two images and has the labels `first`, `second` and perhaps `tie`; "point" shows one and has
    `levels`, a number for each of its `aspects`. `question` holds the places of the texts and the images in the user's
    turn. `thinks` says whether there are reasons before the answer, between `think_begin` and `think_end` if it has
    these. The answer stands behind `lead`, and `counts` says which of several. `closing` is appended to reasons that
    ran out of tokens, `at_once` is the whole beginning of a completion without reasons; both end at the answer. A tie
    that takes the place of `lead` begins with `tie_opening`. `source` is the text of its file.
    """

    kind: Literal["pair", "point"]
    question: str
    lead: str
    system: str = ""
    scores_question: str = ""
    criterion: str = ""
    chat_template: Mapping[str, Any] = field(default_factory=dict)
    thinks: bool = True
    think_begin: str = ""
    think_end: str = ""
    max_tokens: int = 0
    counts: Literal["first", "last"] = "first"
    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    tie: tuple[str, ...] = ()
    tie_opening: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    aspects: tuple[str, ...] = ()
    end: str = ""
    after: str = ""
    closing: str = ""
    at_once: str = ""
    name: str = ""
    note: str = ""
    models: tuple[str, ...] = ()
    path: Path | None = field(default=None, compare=False)
    source: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        """ConfigError that lists all contradictions."""
        object.__setattr__(self, "closing", self.closing or self.think_end + self.lead)
        object.__setattr__(self, "at_once", self.at_once or self.think_begin + self.closing)
        if problems := _problems(self):
            raise ConfigError(f"profile {self.path or self.name}: {'; '.join(problems)}")

    def __repr__(self) -> str:
        return f"Profile({self.name!r}, {self.kind}, {self.version()})"

    @property
    def is_point(self) -> bool:
        """Whether it shows one image at a time."""
        return self.kind == "point"

    @property
    def images(self) -> int:
        """The number of images in a question."""
        return 1 if self.is_point else 2

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """The variants of each label at the answer position: first, second and perhaps tie, or the levels."""
        if self.is_point:
            return tuple((level,) for level in self.levels)
        return (self.first, self.second, *([self.tie] if self.tie else []))

    @property
    def text_tokens(self) -> tuple[int, int]:
        """About how many tokens its text takes with a prompt, and how many of these come after the images."""
        words = [text.replace(_CRITERION, self.criterion) for text in (self.question, self.scores_question)]
        after = [text.rpartition(_IMAGE)[2] for text in words]
        whole, behind = (max(len(text.encode()) for text in texts) // _BYTES for texts in (words, after))
        whole += len(self.system.encode()) // _BYTES + _TEMPLATE_TOKENS + _PROMPT_TOKENS
        prompt_is_behind = any(_PROMPT in text for text in after)
        return whole, behind + _TURN_TOKENS + _PROMPT_TOKENS * prompt_is_behind

    def closings(self, at_once: bool = False) -> list[str]:
        """What leads to the answer, or to that of each aspect, from unfinished reasons or from the very beginning."""
        first = self.at_once if at_once else self.closing
        rest = [self.closing] * (len(self.aspects) - 1)
        pairs = zip([first, *rest], self.aspects or [""], strict=True)
        return [text.replace(_ASPECT, aspect) for text, aspect in pairs]

    def check_form(self, form: Form) -> None:
        """ConfigError for a question that the profile does not have."""
        if form == "scores" and not self.scores_question:
            raise ConfigError(
                f"the profile {self.name} has no question for two scores (--strategy score, --reward score): "
                "take another strategy or reward"
            )

    def check_criterion(self, criterion: str) -> None:
        """ConfigError for a criterion that the profile has no place for."""
        if criterion and _CRITERION not in self.question:
            raise ConfigError(
                f"--criterion: the profile {self.name} has no place for it, as its question is fixed; leave it out, or "
                f"ask with --profile {OWN}"
            )

    def messages(self, form: Form = "choice", own_criterion: bool = False, has_prompt: bool = True) -> list[Any]:
        """The chat of one comparison with PROMPT_SLOT, and CRITERION_SLOT if the criterion is the user's own.

        Without a prompt the lines that would hold it are left out.
        """
        text = self.scores_question if form == "scores" else self.question
        if not has_prompt:
            text = _PROMPT_LINE.sub("", text)
        text = text.replace(_CRITERION, CRITERION_SLOT if own_criterion else self.criterion)
        before, *others = text.replace(_PROMPT, PROMPT_SLOT).split(_IMAGE)
        content: list[dict[str, str]] = [{"type": "text", "text": before}] if before else []
        for other in others:
            content.append({"type": "image"})
            if other:
                content.append({"type": "text", "text": other})
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": content}]

    def version(self, criterion: str = "") -> str:
        """A short hash of all that is asked and read, and of the user's own criterion, if any.

        It is kept with adapters, calibrations and stored answers.
        """
        own = {name: value for name, value in asdict(self).items() if name not in _UNASKED}
        text = json.dumps([own, criterion.strip()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def place(self) -> str:
        """What to do for other words than the file's."""
        path = self.path or _built_in_path(self.name)
        return f"to put them in, copy the profile's file ({path}), edit the copy, and give it with --profile"

    def text(self) -> str:
        """The profile as a TOML file that holds its name."""
        return self.source if "name" in tomllib.loads(self.source) else f"name = {json.dumps(self.name)}\n{self.source}"


def read_profile(path: Path) -> Profile:
    """The profile in a TOML file; ConfigError for what is none, unknown keys, wrong types and contradictions."""
    try:
        source = path.read_text(encoding="utf-8")
        values = tomllib.loads(source)
    except FileNotFoundError as error:
        raise ConfigError(
            f"profile {path}: no such file; give a TOML file, or one of {', '.join(built_in_profiles())}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"profile {path}: not readable as TOML: {one_line(error)}") from error
    kinds = {each.name: each.type for each in fields(Profile) if each.name not in ("path", "source")}
    problems = [f"unknown key {name!r}" for name in values if name not in kinds]
    problems += ["name is empty"] if not str(values.get("name", "-")).strip() else []
    problems += [f"{name} is missing" for name in ("kind", "question", "lead") if name not in values]
    checked: dict[str, Any] = {}
    for name in values.keys() & kinds.keys():
        try:
            checked[name] = _checked(name, values[name], kinds[name])
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        known = f"; known are {', '.join(kinds)}" if any("unknown key" in each for each in problems) else ""
        raise ConfigError(f"profile {path}: {'; '.join(sorted(problems))}{known}")
    usual_name = path.parent.name if path.name == PROFILE_FILE else path.stem
    profile = Profile(**{"name": usual_name, **checked, "path": path, "source": source})
    built_in = {} if path.parent == _built_in_path(OWN).parent else built_in_profiles()
    if profile.name in built_in and built_in[profile.name].version() != profile.version():
        return replace(profile, name=f"{profile.name}, changed")  # it is not what its name says
    return profile


@cache
def built_in_profiles() -> Mapping[str, Profile]:
    """The built-in profiles by name, our own first."""
    paths = [_built_in_path(Path(each.name).stem) for each in files("mlxpref.engine").joinpath("profiles").iterdir()]
    return {path.stem: read_profile(path) for path in sorted(paths, key=lambda path: (path.stem != OWN, path.stem))}


def own_profile() -> Profile:
    """Our own profile."""
    return built_in_profiles()[OWN]


def profile_named(name: str) -> Profile:
    """The profile of `--profile`: a file, or a built-in one by name; ConfigError for an unknown one."""
    if name in built_in_profiles():
        return built_in_profiles()[name]
    path = Path(name).expanduser()
    if path.suffix == ".toml" or path.is_file():
        return read_profile(path)
    raise ConfigError(
        f"unknown profile {name!r}: known are {', '.join(built_in_profiles())}, or give a TOML file of your own"
    )


def _built_in_path(name: str) -> Path:
    return Path(str(files("mlxpref.engine").joinpath("profiles", f"{name}.toml")))


def _checked(name: str, value: Any, kind: Any) -> Any:
    """A value of a profile's file in its field's type; a single text is a list of one. ConfigError for others."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{name} is {value!r}, not {' or '.join(get_args(kind))}")
        return value
    if get_origin(kind) is tuple:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(each, str) and each.strip() for each in texts):
            raise ConfigError(f"{name} must be a text, or a list of texts")
        return tuple(each.strip() for each in texts)
    wanted, words = _KINDS.get(kind, (dict, "a table"))
    right = isinstance(value, wanted) and isinstance(value, bool) == (kind is bool)
    if not right or (isinstance(value, int) and value < 0):
        raise ConfigError(f"{name} must be {words}, not {value!r:.40}")
    return value


def _problems(profile: Profile) -> list[str]:
    """What contradicts itself in a profile."""
    p, problems = profile, list[str]()

    def need(condition: bool, problem: str) -> None:
        if not condition:
            problems.append(problem)

    questions = {"question": p.question} | ({"scores_question": p.scores_question} if p.scores_question else {})
    for name, text in questions.items():
        count = text.count(_IMAGE)
        need(count == p.images, f"{name} has {count} places {_IMAGE}, a {p.kind} judge needs {p.images}")
        need(_PROMPT in text, f"{name} has no place {_PROMPT}")
        need((_CRITERION in text) == bool(p.criterion), f"{_CRITERION} in {name} and criterion go together")
        left_out = _PROMPT_LINE.findall(text) if _CRITERION in text else []  # a criterion of one's own needs no prompt
        need(
            not any(_IMAGE in line for line in left_out),
            f"{name} has an {_IMAGE} in the line of {_PROMPT}, which is left out where there is no prompt",
        )
    if p.is_point:
        need(len(p.levels) > 1, "a point judge needs levels, such as 1, 2, 3, 4")
        need(all(re.fullmatch(r"-?\d+(\.\d+)?", level) for level in p.levels), "levels must be numbers")
        need(bool(p.aspects), "a point judge needs aspects: the name of what each score is for")
        need(len(set(p.aspects)) == len(p.aspects), "an aspect stands there twice")
        others = p.first + p.second + p.tie + p.tie_opening
        need(not others and not p.scores_question, "first, second, tie and scores_question are for a pair judge")
    else:
        need(bool(p.first and p.second), "a pair judge needs the labels first and second")
        need(not p.levels and not p.aspects, "levels and aspects are for a point judge")
    labels = [each for label in p.labels for each in label]
    need(len(set(labels)) == len(labels), "a label stands for two answers")
    need(bool(p.lead.strip()), "lead is empty: say what stands before the answer")
    need(bool(p.think_begin) <= bool(p.think_end), "think_begin needs think_end")
    need(p.thinks or not p.think_end, "think_begin and think_end are for a judge that thinks")
    need(p.thinks or not p.max_tokens, "max_tokens is for a judge that thinks")
    need(not p.tie or not p.tie_opening, "a tie is a label (tie) or begins the answer (tie_opening), not both")
    need(not p.tie_opening or not p.thinks, "tie_opening is for a judge that does not think")
    lead = "".join(p.lead.split())
    for name in ("closing", "at_once"):
        text = "".join(getattr(p, name).split())
        need(text.endswith(lead), f"{name} does not end with lead, so no answer would follow it")
    unended = [name for name in ("closing", "at_once") if p.think_end not in getattr(p, name)]
    need(not unended, f"{''.join(unended[:1])} does not hold think_end, so the reasons would not end")
    need(not any(each in p.system for each in (_IMAGE, _PROMPT, _CRITERION)), "system has no places: use question")
    switches = [name for name in p.chat_template if name in _SWITCHES]
    need(not switches, f"chat_template: {', '.join(switches)} is no switch of a chat template")
    need(not p.after or bool(p.end), "after needs end: what stands between a label and the end of the answer")
    slots = any(slot in text for slot in (PROMPT_SLOT, CRITERION_SLOT) for text in (p.system, *questions.values()))
    need(not slots, "it holds a character that stands for the prompt here")
    return problems
