"""The memory that a conversion takes while it writes, beside mlx_vlm.convert, on a checkpoint made for it.

    python -m scripts.conversion_memory                 # 2 GB in bfloat16, files of 200 MB, unquantized and 4 bit
    python -m scripts.conversion_memory --size 0.2      # a quick look
    python -m scripts.conversion_memory --family qwen3_vl_moe

Every conversion runs in a process of its own: peak resident memory from after the imports until the last weight is on
the disk, by the kernel's own count (Linux); `writing_mlx` is what MLX alone counts. Verification comes after that and
is measured by itself: it loads what was written, as whoever uses it will. Prints JSON; exits 1 where writing takes more
than a file, the largest tensor, and 0.3 GB over what the imports take.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
SIZES: dict[str, dict[str, int]] = {
    "qwen2_5_vl": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 128, "num_key_value_heads": 32,
    },
    "qwen3_5": {"hidden_size": 2048, "intermediate_size": 5632},
    "qwen3_vl_moe": {"hidden_size": 1024, "num_experts": 32, "moe_intermediate_size": 768},
}  # fmt: skip
"""The sizes of a checkpoint, by family, in place of the tiny ones."""
Json = dict[str, Any]
ALLOWED = 300_000_000
"""Bytes beside a file and a tensor."""


def make_checkpoint(folder: Path, family: str, sizes: Mapping[str, int], shard: int) -> None:
    """A checkpoint of random weights in bfloat16 and the hub's layout: the tests' tiny one with other `sizes`."""
    write_random(folder, config_of(family, sizes, {}), GOLDEN / family, shard)


def config_of(family: str, text_sizes: Mapping[str, Any], vision_sizes: Mapping[str, Any]) -> Json:
    """The config of the tests' tiny checkpoint with other sizes of the language model and of the vision tower."""
    from mlxpref.checkpoints.families import FAMILIES

    config: Json = json.loads((GOLDEN / family / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"] if FAMILIES[family].is_nested else config
    text.update(text_sizes)
    text.pop("layer_types", None)  # a list of the tiny one's layers, which the interval implies
    config["vision_config"].update(vision_sizes, out_hidden_size=text["hidden_size"])
    return config


def write_random(folder: Path, config: Json, files: Path, shard: int) -> None:
    """Write a config, the other `files` of a checkpoint and random weights of these sizes, tensor by tensor.

    A file of weights has at most `shard` bytes. ModelError where the disk has no room.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_vlm import utils

    from mlxpref.checkpoints.families import FAMILIES
    from mlxpref.checkpoints.names import hub_name
    from mlxpref.conversion.writer import check_space, write_model
    from mlxpref.engine.weights import to_hub

    family = config["model_type"]
    package, _ = utils.get_model_and_args(config)
    settings = utils.update_module_configs(package.ModelConfig.from_dict(config), package, config, ["text", "vision"])
    weights: dict[str, mx.array] = dict(tree_flatten(package.Model(settings).parameters()))
    key = mx.random.key(0)
    for name, weight in weights.items():
        key, own = mx.random.split(key)
        # Norms stay as they are: nothing says of a random checkpoint how large its activations may become.
        drawn = weight if weight.ndim == 1 else 0.05 * mx.random.normal(weight.shape, key=own)
        weights[name] = drawn.astype(mx.bfloat16)
    lazy = {hub_name(name, family): weight for name, weight in to_hub(weights, FAMILIES[family]).items()}
    del weights
    check_space(folder, sum(int(weight.nbytes) for weight in lazy.values()))
    folder.mkdir(parents=True)
    write_model(folder, files, config, lazy, shard, kind="pt")


def layers_of(family: str, gigabytes: float) -> int:
    """How many layers of the family's `SIZES` have about these bytes in bfloat16."""
    sizes = SIZES[family]
    hidden = sizes["hidden_size"]
    if "num_experts" in sizes:
        layer = 3 * sizes["num_experts"] * hidden * sizes["moe_intermediate_size"]
    else:
        layer = 3 * hidden * sizes["intermediate_size"]
    return max(4, round(gigabytes * 1e9 / 2 / layer))


def memory(kind: str) -> int:
    """Bytes of resident memory of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this needs Linux, whose kernel counts resident memory")


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def run_ours(source: Path, output: Path, name: str, shard: int) -> dict[str, Any]:
    """`mlxpref convert`, in this process."""
    import mlx.core as mx
    import mlx_vlm.utils  # noqa: F401  part of the baseline

    from mlxpref.conversion import convert as conversion
    from mlxpref.conversion import verify as verification
    from mlxpref.conversion.quantize import Recipe

    found: dict[str, Any] = {}

    def verifying(*arguments: Any) -> Any:
        found["writing"] = memory("VmHWM") - baseline
        found["writing_mlx"] = mx.get_peak_memory()
        found["writing_seconds"] = round(time.perf_counter() - started, 1)
        forget_peak()
        return verification.verify(*arguments)

    setattr(conversion, "verify", verifying)  # noqa: B010  where writing ends
    baseline = memory("VmRSS")
    forget_peak()
    started = time.perf_counter()
    conversion.convert(source, output, Recipe.named(name), shard_size=shard)
    return found | {"verifying": memory("VmHWM") - baseline, "seconds": round(time.perf_counter() - started, 1)}


def run_theirs(source: Path, output: Path, name: str, shard: int) -> dict[str, Any]:
    """mlx_vlm.convert with its own file size, in this process."""
    import contextlib

    from mlx_vlm.convert import convert

    quantization = {} if name == "none" else {"quantize": True, "q_bits": int(name), "q_group_size": 64}
    baseline = memory("VmRSS")
    forget_peak()
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        convert(str(source), str(output), dtype="bfloat16", trust_remote_code=False, **quantization)
    return {"writing": memory("VmHWM") - baseline, "seconds": round(time.perf_counter() - started, 1)}


def measured(who: str, source: Path, output: Path, name: str, shard: int) -> dict[str, Any]:
    """A conversion in a process of its own; what it wrote is removed."""
    command = [
        sys.executable,
        str(Path(__file__)),
        "--child",
        who,
        str(source),
        str(output),
        name,
        str(shard),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    files = [file.stat().st_size for file in output.glob("*.safetensors")]
    shutil.rmtree(output)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"files": len(files), "largest_file": max(files)}


@click.command()
@click.option("--family", default="qwen2_5_vl", show_default=True, type=click.Choice([*SIZES]))
@click.option("--size", default=2.0, show_default=True, help="GB of the checkpoint.")
@click.option("--shard", default=200, show_default=True, help="MB of a file that is written.")
@click.option("--recipes", default="none,4", show_default=True)
@click.option("--child", nargs=5, hidden=True, type=(str, Path, Path, str, int))
def main(family: str, size: float, shard: int, recipes: str, child: tuple[str, Path, Path, str, int] | None) -> None:
    """Measure conversions side by side and print JSON."""
    if child:
        run = {"ours": run_ours, "theirs": run_theirs}[child[0]]
        print(json.dumps(run(*child[1:])))
        return
    from mlxpref.checkpoints.checkpoint import Checkpoint

    rows = []
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        make_checkpoint(source, family, SIZES[family] | {"num_hidden_layers": layers_of(family, size)}, 500_000_000)
        heads = Checkpoint.open(source).tensors.values()
        largest = max(tensor.size for tensor in heads)
        whole = sum(tensor.size for tensor in heads)
        for name in recipes.split(","):
            ours = measured("ours", source, Path(place) / "ours", name, shard * 10**6)
            theirs = measured("theirs", source, Path(place) / "theirs", name, shard * 10**6)
            limit = shard * 10**6 + largest + ALLOWED
            rows.append(
                {"recipe": name, "limit": limit, "holds": ours["writing"] <= limit, "ours": ours, "mlx_vlm": theirs}
            )
    print(json.dumps({"checkpoint": whole, "largest_tensor": largest, "shard": shard * 10**6, "runs": rows}, indent=2))
    if not all(row["holds"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
