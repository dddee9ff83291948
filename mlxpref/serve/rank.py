"""`POST /rank`, our own: images of one prompt in, their order with intervals, ties and reasons out."""

from collections.abc import Mapping
from typing import Any

from mlxpref.errors import DataError
from mlxpref.judge.judge import Judge
from mlxpref.reward.group import reason_for
from mlxpref.serve.body import decode_all, get_content, get_list, get_text
from mlxpref.serve.device_queue import Work
from mlxpref.text import first_ten

_OPTIONS = ("pairs", "top", "think_about", "orders")
"""Those of `Judge.rank`, which also checks them."""
_KEPT = (
    "prompt", "criterion", "model", "adapter", "position_bias", "warnings", "orders", "intervals", "comparisons",
    "seconds", "tokens",
)  # fmt: skip
"""What the answer has of a ranking's JSON besides images and pairs."""


def read_rank(body: Mapping[str, Any]) -> Work:
    """The work for `{"prompt": text, "images": [base64]}`, perhaps with options of `Judge.rank`.

    Images have numbers from 0, in the order in which they were sent. Those that cannot be read are in `skipped`.
    """
    if unknown := sorted({*body} - {"prompt", "images", *_OPTIONS}):
        raise DataError(f'unknown key "{unknown[0]}"; known are prompt, images, {", ".join(_OPTIONS)}')
    prompt = get_text(body.get("prompt", ""), '"prompt"')
    contents = [get_content(value, f"image {number}") for number, value in enumerate(get_list(body, "images"))]
    options = {name: body[name] for name in _OPTIONS if body.get(name) is not None}

    def work(judge: Judge) -> dict[str, Any]:
        decoded = decode_all(contents, judge.vlm.features.max_pixels)
        places = [place for place, image in enumerate(decoded) if not isinstance(image, DataError)]
        errors = {place: str(error) for place, error in enumerate(decoded) if isinstance(error, DataError)}
        if len(places) < 2:
            reasons = first_ten([*errors.values()], "; ")
            raise DataError(
                f"images are compared with each other: two are needed, not {len(places)}{'; ' * bool(errors)}{reasons}"
            )
        images = [image for image in decoded if not isinstance(image, DataError)]
        ranking = judge.rank(images, prompt, **options)
        found = ranking.to_json()
        skipped = [{"index": place, "error": error} for place, error in errors.items()]
        entries = [
            {
                "index": places[entry.index],
                **{name: value for name, value in each.items() if name != "path"},
                "tied_with": [places[other] for other in entry.tied_with],
                "reason": reason_for(entry, places),
            }
            for entry, each in zip(ranking, found["images"], strict=True)
        ]
        pairs = [
            {**each, "a": places[pair.a], "b": places[pair.b]}
            for each, pair in zip(found["pairs"], ranking.pairs, strict=True)
        ]
        return {name: found[name] for name in _KEPT} | {"images": entries, "pairs": pairs, "skipped": skipped}

    return work
