"""A checkpoint in mlxpref beside the same checkpoint in transformers: input ids, pixels, and logits at every position.

    python convert/parity.py FOLDER                        # torch and transformers in this environment
    python convert/parity.py FOLDER --python OTHER/python  # or in an environment of their own

FOLDER is an unquantized checkpoint of a supported architecture, in any layout that mlxpref reads. Both sides run on the
same two pictures of different sizes and the same words, mlxpref in float32, transformers in float64 if memory allows:
in float32 its own rounding moves a logit of a tiny model by up to 2.5e-4. Prints JSON; exits 1 where the logits differ
by more than `--tolerance`.
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from PIL import Image

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.engine.adapters import load_adapter
from mlxpref.engine.decoder import run_block
from mlxpref.engine.profile import PROMPT_SLOT, own_profile
from mlxpref.engine.vlm import load_vlm

PROMPT = "a red circle"
PIXELS = 512 * 512


def write_reference(folder: str, request: str, output: str) -> None:
    """Run by a process of its own, from this very source: importing mlx-vlm changes transformers' classes."""
    import json
    from pathlib import Path

    import numpy as np
    import torch
    import transformers
    from PIL import Image

    settings = json.loads(Path(request).read_text(encoding="utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = [Image.open(path).convert("RGB") for path in settings["images"]]
    features = dict(processor(images=images, return_tensors="pt"))
    text = tokenizer.apply_chat_template(settings["messages"], tokenize=False, add_generation_prompt=True)
    first, second, rest = text.split("<|image_pad|>")
    pads = ["<|image_pad|>" * (int(grid.prod()) // processor.merge_size**2) for grid in features["image_grid_thw"]]
    ids = tokenizer(first + pads[0] + second + pads[1] + rest, return_tensors="pt")["input_ids"]
    dtype = getattr(torch, settings["dtype"])
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    pixels = features.pop("pixel_values")
    kinds = (ids == model.config.image_token_id).int()
    if settings["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, settings["adapter"])
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, mm_token_type_ids=kinds, pixel_values=pixels.to(dtype), **features).logits
    np.savez(output, input_ids=ids[0], logits=logits[0], pixel_values=pixels)


def reference(
    folder: Path, images: list[Image.Image], python: str, place: Path, adapter: Path | None, dtype: str
) -> dict[str, Any]:
    """Input ids (L,), pixel values and logits (L, V) as transformers has them, in another process."""
    paths = [str(place / f"{number}.png") for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    messages = json.loads(json.dumps(own_profile().messages(), ensure_ascii=False).replace(PROMPT_SLOT, PROMPT))
    request, output = place / "request.json", place / "reference.npz"
    settings = {"images": paths, "messages": messages, "adapter": str(adapter) if adapter else None, "dtype": dtype}
    request.write_text(json.dumps(settings), encoding="utf-8")
    program = f"import sys\n{inspect.getsource(write_reference)}\nwrite_reference(*sys.argv[1:])"
    done = subprocess.run(
        [python, "-c", program, str(folder), str(request), str(output)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"transformers failed:\n{done.stderr[-2000:]}")
    with np.load(output) as arrays:
        return dict(arrays)


def compare(
    folder: Path,
    python: str = sys.executable,
    adapter: Path | None = None,
    theirs: Path | None = None,
    dtype: str = "float64",
) -> dict[str, Any]:
    """How far mlxpref and transformers are apart on one comparison of two pictures.

    With an `adapter` in PEFT's format both put it on; with `theirs`, transformers has that folder without it instead.
    `dtype` is what transformers computes in.
    """
    if "quantization" in Checkpoint.open(folder).config:
        raise click.ClickException(f"{folder}: is quantized, which transformers cannot read; give what it was made of")
    rng = np.random.default_rng(0)
    first = render(PictureSpec("red", "green", "blue", "red"), rng)
    second = render(PictureSpec("blue", "red", "green", "blue", "noisy"), rng).crop((0, 0, 56, 84))
    with tempfile.TemporaryDirectory() as place:
        expected = reference(theirs or folder, [first, second], python, Path(place), None if theirs else adapter, dtype)
    vlm = load_vlm(folder, PIXELS, mx.float32)
    if adapter is not None:
        load_adapter(vlm.model, adapter)
    comparison = vlm.input(first, second, PROMPT, "choice", think=True)
    same_ids = comparison.ids.tolist() == expected["input_ids"].tolist()
    report: dict[str, Any] = {"folder": str(folder), "positions": len(comparison), "input_ids_equal": same_ids}
    if not same_ids:
        return report
    hidden, _ = run_block(vlm.decoder, vlm.block([comparison]), recompute=False)
    ours = np.array(vlm.head(hidden)[0])
    finite = np.isfinite(ours)
    difference = np.abs(np.where(finite, ours, 0) - np.where(finite, expected["logits"], 0))
    return report | {
        "largest_logit_difference": float(difference.max()),
        "logit_deviation": float(expected["logits"].std()),
        "same_likeliest_token": float(
            (ours.argmax(-1) == np.where(finite, expected["logits"], -np.inf).argmax(-1)).mean()
        ),
    }


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--python", default=sys.executable, help="The Python that has torch and transformers.")
@click.option("--tolerance", default=1e-3, show_default=True, help="Largest logit difference that passes.")
@click.option(
    "--adapter", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A PEFT adapter that both put on."
)
@click.option(
    "--dtype",
    default="float64",
    show_default=True,
    type=click.Choice(["float64", "float32"]),
    help="What transformers computes in; float32 takes half the memory.",
)
def main(folder: Path, python: str, tolerance: float, adapter: Path | None, dtype: str) -> None:
    """Compare FOLDER in mlxpref with the same folder in transformers."""
    report = compare(folder, python, adapter, dtype=dtype)
    print(json.dumps(report, indent=2))
    if not report.get("largest_logit_difference", np.inf) <= tolerance:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
