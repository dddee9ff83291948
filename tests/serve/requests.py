"""Requests to the reward server: pictures of the demo in base64, and the JSON of each protocol."""

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mlxpref.demo.pictures import PictureSpec, render

PROMPT = "a red circle, a blue square, a green cross"
OTHER_PROMPT = "a yellow cross, a red square, a blue circle"
SPECS = [
    PictureSpec(*each)
    for each in (
        ("blue", "red", "green", "yellow", "blurry"),
        ("red", "blue", "yellow", "green", "clean"),
        ("green", "yellow", "blue", "red", "noisy"),
        ("blue", "yellow", "red", "green", "blurry"),
        ("yellow", "blue", "green", "red", "noisy"),
        ("green", "red", "yellow", "blue", "blurry"),
    )
]
BEST = 1
"""The number of the only picture with a red circle, and the only clean one: the judge finds it, untrained as it is."""


def pictures(specs: Sequence[PictureSpec] = SPECS, seed: int = 0) -> list[Image.Image]:
    return [render(spec, np.random.default_rng([seed, number])) for number, spec in enumerate(specs)]


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def chat(images: Sequence[Image.Image], text: str = PROMPT, **options: Any) -> dict[str, Any]:
    """A chat request with these images before the text."""
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(x)}"}} for x in images]
    content = [*parts, {"type": "text", "text": text}]
    return {"model": "any", "messages": [{"role": "user", "content": content}], **options}


def turns(images: Sequence[str], prompts: Sequence[str], names: Sequence[str], **others: Any) -> list[dict[str, Any]]:
    """UniRL's requests for images in base64."""
    return [
        {"history": [{"text": text, "image_b64": image}], "required_rewards": [*names], "metadata": None, **others}
        for image, text in zip(images, prompts, strict=True)
    ]


def ask(address: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """The status and the JSON of an answer; `body` is an object, or bytes that are sent as they are."""
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, content, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
