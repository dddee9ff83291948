import json
from pathlib import Path
from typing import Any

import pytest

from mlxpref.data.comfyui import prompt_in_graph
from mlxpref.data.prompt_metadata import prompt_in_image
from tests.data.test_prompt_metadata import commented, png, problem


def encoder(text: object, **inputs: object) -> dict[str, Any]:
    return {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["4", 1], **inputs}}


def node(kind: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def sampler(positive: object, negative: object = None, kind: str = "KSampler") -> dict[str, Any]:
    return node(kind, seed=1, steps=20, sampler_name="euler", positive=positive, negative=negative or ["7", 0],
                model=["4", 0], latent_image=["5", 0])  # fmt: skip


BASE = {
    "4": node("CheckpointLoaderSimple", ckpt_name="model.safetensors"),
    "5": node("EmptyLatentImage", width=512, height=512),
    "7": encoder("ugly"),
}


def link(number: int | str, output: int = 0) -> list[Any]:
    return [str(number), output]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ({"3": sampler(link(6)), "6": encoder("a cube")}, "a cube"),
        # conditioning, Control Net and guidance on the way
        (
            {
                "3": sampler(link(10), link(10, 1)),
                "10": node("ControlNetApplyAdvanced", positive=link(11), negative=link(7), image=link(12)),
                "11": node("FluxGuidance", guidance=3.5, conditioning=link(6)),
                "12": node("LoadImage", image="text.png"),
                "6": encoder("a cube"),
            },
            "a cube",
        ),
        # text by links, joined by a string node; a loop; a node that stands in it twice
        (
            {
                "3": sampler(link(6)),
                "6": encoder(link(20)),
                "20": node("StringConcatenate", string_a=link(21), string_b="on grass", delimiter=", "),
                "21": node("PrimitiveStringMultiline", value="a cube", string=link(20)),
            },
            "a cube, on grass",
        ),
        (
            {
                "3": sampler(link(30)),
                "30": node("ConditioningCombine", conditioning_1=link(6), conditioning_2=link(31)),
                "31": node("ConditioningConcat", conditioning_to=link(6), conditioning_from=link(32)),
                "32": encoder("on grass"),
                "6": encoder("a cube"),
            },
            "a cube\non grass",
        ),
        # custom sampling
        (
            {
                "3": node("SamplerCustomAdvanced", guider=link(40), sampler=link(41), latent_image=link(5)),
                "40": node("BasicGuider", conditioning=link(6), model=link(4)),
                "41": node("KSamplerSelect", sampler_name="euler"),
                "6": node("CLIPTextEncodeFlux", clip_l="a cube", t5xxl="a cube", guidance=3.5, clip=link(4, 1)),
            },
            "a cube",
        ),
        # two passes that agree, one that enlarges and is told nothing
        (
            {
                "3": sampler(link(6)),
                "8": sampler(link(6)),
                "9": sampler(link(50), kind="UltimateSDUpscale"),
                "50": encoder(""),
                "6": encoder("a cube"),
            },
            "a cube",
        ),
        # a loader that holds both prompts, a pipe, wildcards
        (
            {
                "3": sampler(link(60, 1), link(60, 2), "KSampler (Efficient)"),
                "60": node("Efficient Loader", ckpt_name="a", positive="a cube", negative="ugly"),
            },
            "a cube",
        ),
        (
            {
                "3": node("ImpactKSamplerBasicPipe", basic_pipe=link(61), steps=20),
                "61": node("ToBasicPipe", positive=link(6), negative=link(7), clip=link(4, 1)),
                "6": encoder(link(62)),
                "62": node(
                    "ImpactWildcardProcessor", wildcard_text="a {cube|ball}", populated_text="a cube", mode="fixed"
                ),
            },
            "a cube",
        ),
        ({"1": node("FluxProUltraImageNode", prompt="a cube", seed=1)}, "a cube"),
        ({"3": sampler(link(6)), "6": encoder("")}, ""),
        ({"3": sampler(link(99)), "6": encoder("a cube")}, None),
        # a question to a language model, whose answer is not recorded, is not the prompt
        (
            {"3": sampler(link(80)), "80": node("Unknown", image=link(12)), "81": node("Ask", prompt="what is it?")},
            None,
        ),
        ({"3": "broken", "6": {"inputs": []}, "8": {}}, None),
    ],
)
def test_prompts_are_followed_through_graphs(tmp_path: Path, nodes: dict[str, Any], expected: str | None) -> None:
    graph = {**BASE, **nodes}
    assert prompt_in_graph(graph) == expected
    assert prompt_in_graph(dict(reversed(graph.items()))) == expected
    text = json.dumps(graph)
    assert prompt_in_image(png(tmp_path / "a.png", {"prompt": text})) == expected
    assert prompt_in_image(commented(tmp_path / "a.webp", "prompt:" + text, 0x0110, False)) == expected
    comment = b"UNICODE\0" + json.dumps({"prompt": graph, "workflow": {}}).encode("utf-16-le")
    assert prompt_in_image(commented(tmp_path / "a.jpg", comment)) == expected


def decoded(sampler_number: int) -> dict[str, Any]:
    return node("VAEDecode", samples=link(sampler_number), vae=link(4, 2))


@pytest.mark.parametrize(
    "nodes",
    [
        # a second pass over the latent, saved, too
        {
            "20": node("LatentUpscale", samples=link(3), width=1024),
            "21": sampler(link(9)) | {"inputs": {**sampler(link(9))["inputs"], "latent_image": link(20)}},
            "22": decoded(21),
            "23": node("SaveImage", images=link(22)),
        },
        # passes over the decoded image: a face, an enlargement
        {
            "20": node("FaceDetailer", image=link(10), positive=link(9), negative=link(7), steps=20),
            "21": node("ImageScaleBy", image=link(20)),
            "22": node("UltimateSDUpscale", image=link(21), positive=link(9), negative=link(7), steps=20),
            "23": node("SaveImage", images=link(22)),
        },
        # an image that is only looked at for the shape of the next one
        {
            "20": node("EmptyLatentImage", width=512),
            "21": sampler(link(9)),
            "22": decoded(21),
            "24": node("Canny", image=link(22)),
            "25": node("ControlNetApply", conditioning=link(6), image=link(24)),
            "3": sampler(link(25)),
        },
        # a pipe with a setting that is true or false
        {
            "3": sampler(link(20)),
            "20": node("ToBasicPipe", positive=link(6), negative=link(9), clip=link(4, 1), cached=True),
        },
        # a pipe
        {
            "20": node("ttN pipeLoader", positive="a cube", negative="ugly", seed=1),
            "3": node("ttN pipeKSampler", pipe=link(20), steps=20),
            "21": node("ttN pipeKSampler", pipe=link(3), positive=link(9), steps=9),
            "23": node("SaveImage", images=link(21, 8)),
        },
    ],
)
def test_the_sampler_that_begins_the_image_has_the_prompt(nodes: dict[str, Any]) -> None:
    graph = {
        **BASE,
        "3": sampler(link(6)),
        "6": encoder("a cube"),
        "9": encoder("detailed face"),
        "10": decoded(3),
        "11": node("SaveImage", images=link(10)),
        **nodes,
    }
    assert prompt_in_graph(graph) == "a cube"
    assert prompt_in_graph(dict(reversed(graph.items()))) == "a cube"


@pytest.mark.parametrize(
    ("inputs", "kind", "expected"),
    [
        ({"string_b": "grass", "delimiter": " on ", "string_a": link(30)}, "StringConcatenate", "a Red cube on grass"),
        ({"text2": "", "text1": link(30), "separator": ", "}, "CR Text Concatenate", "a Red cube"),
        ({"text_b": "grass", "text_a": link(30), "delimiter": "\\n"}, "Text Concatenate", "a Red cube\ngrass"),
        ({"string": link(30), "find": "cube", "replace": link(31)}, "StringReplace", "a Red ball"),
        ({"text": link(30), "find1": "Red", "replace1": "blue", "find2": "cube", "replace2": "ball"}, "CR Text Replace",
         "a blue ball"),
        ({"action": "append", "tidy_tags": "yes", "text_b": "4k", "text_a": link(30)}, "StringFunction|pysssss",
         "a Red cube, 4k"),
        ({"action": "replace", "tidy_tags": "no", "text_a": link(30), "text_b": "cube", "text_c": link(31)},
         "StringFunction|pysssss", "a Red ball"),
        ({"switch": False, "on_true": link(31), "on_false": link(30)}, "ComfySwitchNode", "a Red cube"),
        ({"select": 2, "input1": link(31), "input2": link(30), "sel_mode": False}, "ImpactSwitch", "a Red cube"),
        ({"string": link(30), "mode": "lowercase"}, "CaseConverter", "a red cube"),
        ({"string": link(30), "start": 2, "end": 5}, "StringSubstring", "Red"),
        ({"string": link(30), "mode": "Both"}, "StringTrim", "a Red cube"),
    ],
)  # fmt: skip
def test_string_nodes_are_applied(inputs: dict[str, Any], kind: str, expected: str) -> None:
    strings = {"30": node("PrimitiveString", value="a Red cube"), "31": node("PrimitiveString", value="ball")}
    graph = {**BASE, **strings, "3": sampler(link(6)), "6": encoder(link(32)), "32": node(kind, **inputs)}
    assert prompt_in_graph(graph) == expected


def test_string_nodes_that_repeat_without_end() -> None:
    graph = {str(i): node("Join", text1=link(i + 1), text2=link(i + 1), separator=", ") for i in range(30)}
    graph |= {"30": node("PrimitiveString", value="a cube"), "s": sampler(link(0))}
    assert "more than 100,000 characters" in problem(prompt_in_graph, graph)
    chain = {str(i): node("Join", text1=link(i + 1), separator="") for i in range(4_000)}
    assert "too many to be read" in problem(prompt_in_graph, {**chain, "s": sampler(link(0))})
    assert prompt_in_graph({"1": node("Join", text1=link(1), text2="a cube", separator=""), "s": sampler(link(1))}) == (
        "a cube"
    )


def test_ambiguous_graphs_are_errors() -> None:
    two = {**BASE, "3": sampler(link(6)), "6": encoder("a cube"), "8": sampler(link(9)), "9": encoder("a\nball")}
    assert problem(prompt_in_graph, two).startswith(
        "has 2 different prompts in its ComfyUI graph (“a cube” and “a ball”)"
    )
    switch = node("ComfySwitchNode", switch=link(71), on_true=link(6), on_false=link(9))
    assert "a switch in its ComfyUI graph" in problem(prompt_in_graph, {**two, "3": sampler(link(70)), "70": switch})


def test_large_and_tangled_graphs() -> None:
    count = 4_000
    graph = {str(i): node("Reroute", conditioning_1=link(i + 1), conditioning_2=link(i + 2)) for i in range(count)}
    assert prompt_in_graph({**graph, str(count): encoder("a cube"), "start": sampler(link(0))}) == "a cube"
    graph |= {str(i): node("Reroute") for i in range(5_001)}
    assert "of 5,001 nodes" in problem(prompt_in_graph, graph)


def test_malformed_graphs(tmp_path: Path) -> None:
    for broken in ({"nodes": [1, {}]}, {"3": {"inputs": 5}}, {"3": {"inputs": {"positive": [[]]}}}, {}, [], "x", None):
        assert prompt_in_graph(broken) is None
    assert prompt_in_image(png(tmp_path / "a.png", {"prompt": "{broken"})) == "{broken"  # nothing says that it is JSON
