"""The prompt in a ComfyUI graph: what the sampler that made an image was told to show."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from mlxpref.errors import DataError

__all__ = ["prompt_in_graph"]

NODE_LIMIT = 5_000
"""The most nodes of a graph that is followed; large ones that people draw have some hundred."""
Nodes = dict[str, dict[str, Any]]
"""What runs: number of a node -> its `class_type` and `inputs`; an input is a value, or a link [number, output]."""

# What a prompt's text is called, on encoders, string nodes and wildcard nodes ...
_TEXT = re.compile(r"text|prompt|string|value|positive|clip_?[lg]$|t5xxl|mt5xl|bert|llama", re.I)
# ... and what it goes through on its way to a sampler: conditioning, guiders, pipes, reroutes and switches.
_WAY = re.compile(rf"{_TEXT.pattern}|cond|guider|pipe|any(_\d+)?$|^(input|source)_?\d*$|^on_(true|false)$|^$", re.I)
_NOT_THE_PROMPT = re.compile(
    r"negative|^neg_|system|wildcard_text|encoder|model|name|path|file|style|mode|type|delimiter|separator|^log_", re.I
)
_STARTS = ("positive", "guider", "conditioning", "text_embeds", "basic_pipe", "pipe")
_SILENCED = (2, 4)
"""The `mode` of nodes that are muted or bypassed in a workflow."""


def prompt_in_graph(graph: Any) -> str | None:
    """The positive prompt of a graph, in the form that runs (`prompt`) or that is drawn (`workflow`).

    From the `positive` input of each sampler, back through conditioning, reroutes and string nodes to text; what
    several nodes say is several lines, each said once. What a node makes of its text is not known: of one that replaces
    words or asks a language model, this is what went in. None if there is no text to be found. DataError if samplers
    were told different things, or a switch chose: then the graph does not say which of them the image shows.
    """
    nodes = _drawn(graph) if isinstance(graph, dict) and isinstance(graph.get("nodes"), list) else _running(graph)
    if len(nodes) > NODE_LIMIT:
        raise DataError(f"has a ComfyUI graph of {len(nodes):,} nodes, more than {NODE_LIMIT:,}, which is not read")
    starts = [start for node in nodes.values() if (start := _start(node)) is not None]
    if not starts:  # nodes that call a service have a prompt, and no sampler
        starts = [node["inputs"]["prompt"] for node in nodes.values() if "prompt" in node["inputs"]]
    prompts = {text: None for start in starts if (text := _told(nodes, start)) is not None}
    if len(prompts) > 1:  # a pass that only enlarges is often told nothing
        prompts.pop("", None)
    if len(prompts) > 1:
        shown = " and ".join(f"“{' '.join(text.split())[:40]}”" for text in list(prompts)[:2])
        raise DataError(f"has {len(prompts)} different prompts in its ComfyUI graph ({shown}); name one in a file")
    return next(iter(prompts), None)


def _start(node: dict[str, Any]) -> Any:
    """The input in which a sampler is told what to show; None for other nodes."""
    kind, inputs = node["class_type"].casefold(), node["inputs"]
    if "sampler" not in kind and "sampler_name" not in inputs and "steps" not in inputs:
        return None
    return next((inputs[name] for name in _STARTS if name in inputs), None)


def _told(nodes: Nodes, start: Any) -> str | None:
    """What an input says: itself, or the texts behind its link."""
    if isinstance(start, str):
        return start.strip()
    link = _link(start, nodes)
    texts = list(dict.fromkeys(_texts(nodes, link))) if link else []
    return "\n".join(text for text in texts if text) if texts else None


def _texts(nodes: Nodes, start: str) -> Iterator[str]:
    """The texts that a node is made from, in order; no node is entered twice, so loops end."""
    entered: set[str] = set()
    ahead: list[tuple[str | None, str]] = [(start, "")]  # a node's number, or None and a text
    while ahead:
        number, text = ahead.pop()
        if number is None:
            yield text.strip()
        if number is None or number in entered:
            continue
        entered.add(number)
        kind, inputs = nodes[number]["class_type"], nodes[number]["inputs"]
        if "positive" in inputs:  # the node has the negative prompt, too
            inputs = {"positive": inputs["positive"]}
        found: list[tuple[str | None, str]] = []
        for name, value in inputs.items():
            if isinstance(value, str) and _is(_TEXT, name):
                found.append((None, value))
            elif _is(_WAY, name) and (link := _link(value, nodes)):
                found.append((link, ""))
        if "switch" in kind.casefold() and len(found) > 1:
            raise DataError(f"has a switch in its ComfyUI graph ({kind[:40]}): which prompt it took is not recorded")
        ahead += reversed(found)


def _is(names: re.Pattern[str], name: str) -> bool:
    return bool(names.search(name)) and not _NOT_THE_PROMPT.search(name)


def _link(value: Any, nodes: Nodes) -> str | None:
    """The node that an input is linked to, if it is."""
    number = str(value[0]) if isinstance(value, list) and len(value) == 2 else ""
    return number if number in nodes else None


def _running(graph: Any) -> Nodes:
    """The well-formed nodes of a graph in the form that runs."""
    nodes = graph.items() if isinstance(graph, dict) else ()
    return {
        str(number): {"class_type": str(node.get("class_type")), "inputs": node["inputs"]}
        for number, node in nodes
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }


def _drawn(workflow: dict[str, Any]) -> Nodes:
    """A drawn graph in the form that runs, as far as prompts need it.

    Values have no names there unless a recent version wrote them: an encoder's or a string node's are all text. What
    is inside subgraphs is not looked at.
    """
    links = dict(_drawn_links(workflow.get("links")))
    nodes: Nodes = {}
    for node in workflow["nodes"]:
        if not isinstance(node, dict) or node.get("mode") in _SILENCED:
            continue
        kind, slots, values = str(node.get("type")), node.get("inputs"), node.get("widgets_values")
        linked: dict[str, Any] = {}
        for slot in slots if isinstance(slots, list) else ():
            if isinstance(slot, dict) and isinstance(number := slot.get("link"), int) and number in links:
                linked[str(slot.get("name"))] = [links[number], 0]
        inputs: dict[str, Any] = {}
        # Where text comes by a link, the text that is still written in the node is not the one that was used.
        if re.search(r"text|string|primitive", kind, re.I) and not any(_is(_TEXT, name) for name in linked):
            values = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
            inputs = {f"text_{i}": value for i, value in enumerate(values) if isinstance(value, str)}
        inputs |= linked
        nodes[str(node.get("id"))] = {"class_type": kind, "inputs": inputs}
    return nodes


def _drawn_links(links: Any) -> Iterator[tuple[int, str]]:
    """Number of a link and the node it comes from; links are lists up to version 0.4, objects from 1.0 on."""
    for link in links if isinstance(links, Iterable) else ():
        if isinstance(link, dict) and isinstance(link.get("id"), int):
            yield link["id"], str(link.get("origin_id"))
        elif isinstance(link, list) and len(link) >= 2 and isinstance(link[0], int):
            yield link[0], str(link[1])
