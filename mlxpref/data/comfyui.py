"""The prompt in a ComfyUI graph: the input text of an image's sampler."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from mlxpref.errors import DataError
from mlxpref.text import shorten

NODE_LIMIT = 5_000
"""The most nodes of a graph; large real ones have some hundred."""
TEXT_LIMIT = 100_000
"""The most characters that string nodes may make."""
Nodes = dict[str, dict[str, Any]]
"""Number of a node -> its `class_type` and `inputs`; an input is a value, or a link [number, output]."""

# Names of a prompt's text, on encoders, string nodes and wildcard nodes ...
_TEXT = re.compile(r"text|prompt|string|value|positive|clip_?[lg]$|t5xxl|mt5xl|bert|llama", re.I)
# ... and of its way to a sampler: conditioning, guiders, pipes, reroutes and switches.
_WAY = re.compile(rf"{_TEXT.pattern}|cond|guider|pipe|any(_\d+)?$|^(input|source)_?\d*$|^on_(true|false)$|^$", re.I)
_NOT_THE_PROMPT = re.compile(
    r"negative|^neg_|system|wildcard_text|encoder|model|name|path|file|style|mode|type|delimiter|separator|^log_", re.I
)
_STARTS = ("positive", "guider", "conditioning", "text_embeds", "basic_pipe", "pipe")
# The way of the image itself through the nodes: latents before it is decoded, images after that.
_IMAGE_WAY = re.compile(r"latent|samples|image|pixels|frames|pipe|any(_\d+)?$|^(input|source)_?\d*$|^on_|^$", re.I)
_DELIMITERS = ("delimiter", "separator", "delim", "sep")


def prompt_in_graph(graph: Any) -> str | None:
    """The positive prompt of a graph in ComfyUI's form for running, `prompt`.

    It follows the `positive` input of a sampler back through conditioning, reroutes and string nodes to text; string
    nodes are applied, and the texts of several encoders are lines, each once. Only samplers that begin an image count,
    not those that enlarge or correct it. Where a node asks a language model, it returns the node's input. None if there
    is no text. DataError if samplers have different prompts, or a switch chose one by what the graph does not record:
    then it does not tell the image's prompt.
    """
    nodes = _nodes(graph)
    if len(nodes) > NODE_LIMIT:
        raise DataError(f"has a ComfyUI graph of {len(nodes):,} nodes, more than {NODE_LIMIT:,}, which is not read")
    samplers = {number: start for number, node in nodes.items() if (start := _start(node)) is not None}
    starts = [samplers[number] for number in _first_samplers(nodes, set(samplers))]
    if not starts:  # nodes that call a service have a prompt but no sampler
        starts = [node["inputs"]["prompt"] for node in nodes.values() if "prompt" in node["inputs"]]
    try:
        prompts = {text: None for start in starts if (text := _text_behind(nodes, start, {})) is not None}
    except RecursionError as error:
        raise DataError("has a ComfyUI graph with string nodes behind string nodes, too many to be read") from error
    if len(prompts) > 1:
        prompts.pop("", None)
    if len(prompts) > 1:
        examples = " and ".join(f"“{shorten(text)}”" for text in list(prompts)[:2])
        raise DataError(f"has {len(prompts)} different prompts in its ComfyUI graph ({examples}); name one in a file")
    return next(iter(prompts), None)


def _first_samplers(nodes: Nodes, samplers: set[str]) -> list[str]:
    """The samplers that begin a saved image: they get an empty latent or a loaded image, not what a sampler made."""
    behind: dict[str, list[str]] = {}
    ahead: dict[str, list[str]] = {}
    for number, node in nodes.items():
        links = (_link(value, nodes) for name, value in node["inputs"].items() if _IMAGE_WAY.search(name))
        behind[number] = [link for link in links if link is not None]
        for link in behind[number]:
            ahead.setdefault(link, []).append(number)
    later = _reached(ahead, [number for sampler in samplers for number in ahead.get(sampler, [])])
    saving = [number for number, node in nodes.items() if "save" in node["class_type"].casefold()]
    first, saved = samplers - later, _reached(behind, saving)
    return sorted(first & saved or first or samplers)


def _reached(edges: dict[str, list[str]], starts: list[str]) -> set[str]:
    """The nodes that edges lead to from these, and these."""
    reached, waiting = set(starts), list(starts)
    while waiting:
        new = set(edges.get(waiting.pop(), ())) - reached
        reached |= new
        waiting += new
    return reached


def _start(node: dict[str, Any]) -> Any:
    """The input of a sampler that holds its prompt; None for other nodes."""
    kind, inputs = node["class_type"].casefold(), node["inputs"]
    if "sampler" not in kind and "sampler_name" not in inputs and "steps" not in inputs:
        return None
    return next((inputs[name] for name in _STARTS if name in inputs), None)


def _text_behind(nodes: Nodes, start: Any, known: dict[str, str | None]) -> str | None:
    """The text of an input: itself, or the texts behind its link; `known` has the texts of string nodes."""
    if isinstance(start, str):
        return start.strip()
    link = _link(start, nodes)
    texts = list(dict.fromkeys(_texts(nodes, link, known))) if link else []
    return "\n".join(text for text in texts if text) if texts else None


def _applied(nodes: Nodes, number: str, known: dict[str, str | None]) -> str | None:
    """The text that a string node makes of its inputs; None for nodes that only pass texts on."""
    if number in known:
        return known[number]
    kind, inputs = nodes[number]["class_type"].casefold().replace(" ", ""), nodes[number]["inputs"]

    def text_of(value: Any) -> str:
        return value if isinstance(value, str) else _text_behind(nodes, value, known) or ""

    delimiter = next((name for name in _DELIMITERS if name in inputs), None)
    if delimiter is None and "tidy_tags" in inputs and inputs.get("action") == "append":
        delimiter, inputs = "delimiter", {**inputs, "delimiter": ", " if inputs["tidy_tags"] == "yes" else ""}
    elif inputs.get("action") == "replace":
        inputs = {"text": inputs.get("text_a"), "find": inputs.get("text_b"), "replace": inputs.get("text_c")}
    finds = [name for name in inputs if re.fullmatch(r"find_?\d*", name)]
    action = next((action for action in _ACTIONS if action in kind), None)
    if delimiter is None and not finds and action is None:
        return None
    known[number] = ""  # of a node behind itself
    names = sorted((name for name in inputs if _is(_TEXT, name)), key=lambda name: (len(name), name))
    texts = [text for name in names if (text := text_of(inputs[name]))]
    text = text_of(inputs.get(delimiter)).replace("\\n", "\n").join(texts) if delimiter else "".join(texts)
    for name in finds:
        wanted, instead = text_of(inputs[name]), text_of(inputs.get(name.replace("find", "replace"), ""))
        text = text.replace(wanted, instead) if wanted else text
    known[number] = text = _ACTIONS[action](text, inputs) if action else text
    if len(text) > TEXT_LIMIT:
        raise DataError(f"has a prompt of more than {TEXT_LIMIT:,} characters in its ComfyUI graph; name one in a file")
    return text


def _change_case(text: str, inputs: dict[str, Any]) -> str:
    mode = str(inputs.get("mode")).casefold()
    changes = {"uppercase": str.upper, "lowercase": str.lower, "capitalize": str.capitalize, "title case": str.title}
    return changes.get(mode, str)(text)


def _substring(text: str, inputs: dict[str, Any]) -> str:
    places = [place if isinstance(place := inputs.get(name), int) else None for name in ("start", "end")]
    return text[slice(*places)]


_ACTIONS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "stringtrim": lambda text, _: text.strip(),
    "caseconverter": _change_case,
    "stringsubstring": _substring,
}


def _texts(nodes: Nodes, start: str, known: dict[str, str | None]) -> Iterator[str]:
    """The texts behind a node, in order; it enters no node twice, so loops end."""
    visited: set[str] = set()
    ahead: list[tuple[str | None, str]] = [(start, "")]  # a node's number, or None and a text
    while ahead:
        number, text = ahead.pop()
        if number is None:
            yield text.strip()
        if number is None or number in visited:
            continue
        visited.add(number)
        if (applied := _applied(nodes, number, known)) is not None:
            yield applied.strip()
            continue
        kind, inputs = nodes[number]["class_type"], nodes[number]["inputs"]
        if (chosen := _chosen(inputs) or "positive") in inputs:  # the node also has the negative prompt
            inputs = {chosen: inputs[chosen]}
        behind: list[tuple[str | None, str]] = []
        for name, value in inputs.items():
            if isinstance(value, str) and _is(_TEXT, name):
                behind.append((None, value))
            elif _is(_WAY, name) and (link := _link(value, nodes)):
                behind.append((link, ""))
        if "switch" in kind.casefold() and len(behind) > 1:
            raise DataError(f"has a switch in its ComfyUI graph ({kind[:40]}): which prompt it took is not recorded")
        ahead += reversed(behind)


def _chosen(inputs: dict[str, Any]) -> str | None:
    """The name of the input that a switch takes, if the graph records it: a number, or true or false."""
    number, states = inputs.get("select", inputs.get("index")), [x for x in inputs.values() if isinstance(x, bool)]
    names = [f"input{number}", f"input_{number}", *(f"on_{state}".lower() for state in states if len(states) == 1)]
    return next((name for name in names if name in inputs), None)


def _is(names: re.Pattern[str], name: str) -> bool:
    return bool(names.search(name)) and not _NOT_THE_PROMPT.search(name)


def _link(value: Any, nodes: Nodes) -> str | None:
    """The node that an input links to, if any."""
    number = str(value[0]) if isinstance(value, list) and len(value) == 2 else ""
    return number if number in nodes else None


def _nodes(graph: Any) -> Nodes:
    """The well-formed nodes of a graph."""
    return {
        str(number): {"class_type": str(node.get("class_type")), "inputs": node["inputs"]}
        for number, node in (graph.items() if isinstance(graph, dict) else ())
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
