"""Finds a judge: a folder, a Hugging Face id, the demo, or the recommended one for this device."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlxpref.checkpoints.download import ask_model, bytes_left, cached_model, download_model, needed_bytes
from mlxpref.checkpoints.first_use import FirstUse, converted_judge
from mlxpref.checkpoints.recommended import RecommendedJudge, Work, choose_judge, device_working_set, recommended_judge
from mlxpref.demo import JUDGE
from mlxpref.errors import ModelError
from mlxpref.hub import Destination, HubRepository
from mlxpref.log import logger
from mlxpref.text import format_bytes

Agree = Callable[[str], bool]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@.*)?")
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
_OTHERS = "give --model MODEL (a folder, a Hugging Face id, or `demo`)"


@dataclass(frozen=True)
class _Wanted:
    """A model of the hub; `judge` is its entry among the recommended ones, `is_default` that nobody named it."""

    hub_id: str
    revision: str | None
    judge: RecommendedJudge | None
    is_default: bool = False

    @classmethod
    def of(cls, name: str, revision: str | None = None, work: Work = "judging") -> "_Wanted":
        """The one that a name means; an empty name is the best recommended judge whose work fits this device."""
        if not name.strip():
            judge = choose_judge(device_working_set(), work)
            return cls(*_identified(judge.id, revision), judge, True)
        hub_id, revision = _identified(name, revision)
        return cls(hub_id, revision, recommended_judge(hub_id))

    @property
    def name(self) -> str:
        """Its name, with its revision."""
        return f"{self.hub_id}@{self.revision}" if self.revision else self.hub_id

    def first_use(self) -> FirstUse | tuple[str, Path] | None:
        """What its first use takes, or its name and folder if that was; None for a model that is not converted then."""
        if self.judge is None or not self.judge.is_converted:
            return None
        if found := converted_judge(self.hub_id, self.revision):
            return found
        first = FirstUse.of(self.judge, self.revision)
        return converted_judge(self.hub_id, first.commit) or first

    def words(self, repository: HubRepository) -> str:
        """What a user has to know before a model is downloaded that is used as it is."""
        size, licence = format_bytes(needed_bytes(repository)), repository.licence
        known = f"; {self.judge.known}" if self.judge else ""
        licence = licence or (self.judge.licence if self.judge else "not stated")
        return f"{self.name} ({size}, licence {licence}{known})"

    def require(self, agree: Agree, words: str, question: str, ask: str) -> None:
        """ModelError if the user does not agree to a model that nobody named."""
        opening = "No --model given: the recommended judge for this device is" if self.is_default else ask
        if not opening or agree(f"{opening} {words}. {question}"):
            return
        if self.is_default:
            why = f"no --model given, and the recommended judge for this device is not here yet: {words}"
            raise ModelError(f"{why}: agree with --yes, or {_OTHERS}")
        raise ModelError(f"{words} is not downloaded: agree with --yes")


def find_checkpoint(
    model: str | None, agree: Agree, revision: str | None = None, ask: str = "", work: Work = "judging"
) -> tuple[str, Path]:
    """The name and the folder of a judge; downloads it if necessary, and converts one that is recommended so.

    None means $MLXPREF_MODEL, else the best recommended judge whose `work` fits this device; before the download
    `agree` must return True. `revision` is a branch, tag or commit of a Hugging Face id, which may also be written
    owner/name@revision. `ask` says who needs a model that the user did not name: then `agree` must return True, too.
    """
    name = _name(model)
    if name and _is_local(name):
        return find_source(name, revision)
    wanted = _Wanted.of(name, revision, work)
    try:
        first = wanted.first_use()
    except ModelError as error:
        why = f"; no --model was given, and this is the recommended judge: {_OTHERS}" if wanted.is_default else ""
        raise ModelError(f"{error}{why}") from error
    if first is None:
        return wanted.name, cached_model(wanted.hub_id, wanted.revision) or _download(wanted, agree, ask)
    if isinstance(first, tuple):
        return first
    wanted.require(agree, first.words, "Download and convert it?", ask)
    logger.info(f"first use of {first.words}")
    return first.run()


def find_source(name: str, revision: str | None = None) -> tuple[str, Path]:
    """The name and the folder of a model as it is in its folder or on the hub; see `find_checkpoint`."""
    if _is_local(_name(name)):
        if revision:
            raise ModelError(f"{name}: is no Hugging Face id, so it has no revision {revision!r}; leave that out")
        return name, JUDGE if name == "demo" else _path(name)
    wanted = _Wanted.of(name, revision)
    return wanted.name, cached_model(wanted.hub_id, wanted.revision) or _download(wanted)


def missing_judge(model: str | None, work: Work = "judging") -> tuple[str, dict[Path, int]] | None:
    """The words about a judge that is not here yet, and the bytes that it takes of each place; None for one that is."""
    name = os.environ.get("MLXPREF_MODEL", "") if model is None else model
    if name.strip() and _is_local(name):
        return None
    wanted = _Wanted.of(name, work=work)
    first = wanted.first_use()
    if isinstance(first, FirstUse):
        return f"the judge {first.words}", first.needs
    if first or cached_model(wanted.hub_id, wanted.revision):
        return None
    repository = ask_model(wanted.hub_id, wanted.revision)
    return f"the judge {wanted.words(repository)}", {Destination(repository).root: bytes_left(repository)}


def _download(wanted: _Wanted, agree: Agree = lambda question: False, ask: str = "") -> Path:
    """Download a model as it is, if the user agrees or named it."""
    repository = ask_model(wanted.hub_id, wanted.revision)
    words = wanted.words(repository)
    wanted.require(agree, words, "Download it?", ask)
    logger.info(f"downloading {words} from the Hugging Face hub")
    return download_model(repository)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hugging Face id, with or without a revision."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".")


def _name(model: str | None) -> str:
    """The name of a model, from the environment if none is given; empty where that names none, either."""
    if model is not None and not model.strip():
        raise ModelError("the model's name is empty; give a folder, a Hugging Face id or `demo`")
    return os.environ.get("MLXPREF_MODEL", "") if model is None else model


def _path(name: str) -> Path:
    path = Path(name)
    with suppress(RuntimeError):  # no such user
        path = path.expanduser()
    return path


def _is_local(name: str) -> bool:
    """Whether a name means a folder, be it there or not, or the demo."""
    return name == "demo" or _path(name).exists() or not is_hub_id(name)


def _identified(name: str, revision: str | None) -> tuple[str, str | None]:
    """The id and the revision in a name and an option; ModelError if they contradict each other."""
    hub_id, _, own = name.partition("@")
    if own and revision and own != revision:
        raise ModelError(f"{name}: another revision than {revision!r}, which was asked for; give one of them")
    revision = own or revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelError(f"{hub_id}: {revision!r} is no revision; give a branch, a tag or a commit")
    return hub_id, revision
