"""The prompt in a ComfyUI graph: the input text of an image's sampler."""

import re
from collections.abc import Iterator
from typing import Any

from mlxpref.errors import DataError

NODE_LIMIT = 5_000
"""The most nodes of a graph; large real ones have some hundred."""
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


def prompt_in_graph(graph: Any) -> str | None:
    """The positive prompt of a graph in ComfyUI's form for running, `prompt`.

    It follows the `positive` input of each sampler back through conditioning, reroutes and string nodes to text; the
    texts of several nodes are lines, each once. Where a node replaces words or asks a language model, it returns the
    node's input. None if there is no text. DataError if samplers have different prompts, or a switch chose one: then
    the graph does not tell the image's prompt.
    """
    nodes = _nodes(graph)
    if len(nodes) > NODE_LIMIT:
        raise DataError(f"has a ComfyUI graph of {len(nodes):,} nodes, more than {NODE_LIMIT:,}, which is not read")
    starts = [start for node in nodes.values() if (start := _start(node)) is not None]
    if not starts:  # nodes that call a service have a prompt but no sampler
        starts = [node["inputs"]["prompt"] for node in nodes.values() if "prompt" in node["inputs"]]
    prompts = {text: None for start in starts if (text := _text_behind(nodes, start)) is not None}
    if len(prompts) > 1:  # an upscaling pass often has an empty one
        prompts.pop("", None)
    if len(prompts) > 1:
        examples = " and ".join(f"“{' '.join(text.split())[:40]}”" for text in list(prompts)[:2])
        raise DataError(f"has {len(prompts)} different prompts in its ComfyUI graph ({examples}); name one in a file")
    return next(iter(prompts), None)


def _start(node: dict[str, Any]) -> Any:
    """The input of a sampler that holds its prompt; None for other nodes."""
    kind, inputs = node["class_type"].casefold(), node["inputs"]
    if "sampler" not in kind and "sampler_name" not in inputs and "steps" not in inputs:
        return None
    return next((inputs[name] for name in _STARTS if name in inputs), None)


def _text_behind(nodes: Nodes, start: Any) -> str | None:
    """The text of an input: itself, or the texts behind its link."""
    if isinstance(start, str):
        return start.strip()
    link = _link(start, nodes)
    texts = list(dict.fromkeys(_texts(nodes, link))) if link else []
    return "\n".join(text for text in texts if text) if texts else None


def _texts(nodes: Nodes, start: str) -> Iterator[str]:
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
        kind, inputs = nodes[number]["class_type"], nodes[number]["inputs"]
        if "positive" in inputs:  # the node also has the negative prompt
            inputs = {"positive": inputs["positive"]}
        behind: list[tuple[str | None, str]] = []
        for name, value in inputs.items():
            if isinstance(value, str) and _is(_TEXT, name):
                behind.append((None, value))
            elif _is(_WAY, name) and (link := _link(value, nodes)):
                behind.append((link, ""))
        if "switch" in kind.casefold() and len(behind) > 1:
            raise DataError(f"has a switch in its ComfyUI graph ({kind[:40]}): which prompt it took is not recorded")
        ahead += reversed(behind)


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
