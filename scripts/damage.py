"""Damage to the files of a model folder or an adapter folder, drawn by chance; each replaces a file by another."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Damage = Callable[[Path, Random], None]
VALUES: list[Any] = [None, True, 0, 1, -1, 3, 7, 2**31, 2**63, 10**30, 1e308, 0.5, float("nan"), float("inf"), "", "x"]
VALUES += ["../x", "\ud800", "a\nb", [], [[]], [0, -1], {}, {"a": 1}, "qwen2_vl", "llama", "float32", "9" * 40]
FILES = ["/etc/passwd", "../model.safetensors", "..", "", ".", "a/b.safetensors", "\0.safetensors", "x" * 300, 3, None]
FILES += ["missing.safetensors", [], {}, "config.json", "..\\m.safetensors", "\n.safetensors"]
TYPES = ["F64", "F8_E5M2", "F8_E4M3", "I64", "I32", "U8", "BOOL", "BF16", "F16", "F4", "f32", "", 3, None, "C64"]
TEXTS = ["", "null", "[]", "3", '"x"', "{", '{"a":', "[" * 100_000, '{"a":' * 100_000, "{} {}", "\ufeff{}", "9" * 5000]


def put(file: Path, content: bytes) -> None:
    """Write a file in the place of what may be a link."""
    remove(file)
    file.write_bytes(content)


def remove(file: Path) -> None:
    """Remove a file, a link, or the empty folder that an earlier damage put there."""
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)


def weights_of(folder: Path, rng: Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")) or [folder / "model.safetensors"])


def content_of(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def cut_weights(folder: Path, rng: Random) -> None:
    file = weights_of(folder, rng)
    content = content_of(file)
    put(file, content[: rng.choice((rng.randrange(len(content) + 1), rng.randrange(64), max(0, len(content) - 1)))])


def extend_weights(folder: Path, rng: Random) -> None:
    file = weights_of(folder, rng)
    put(file, content_of(file) + rng.randbytes(rng.choice((1, 8, 4096))))


def flip_bits(folder: Path, rng: Random) -> None:
    """Bits anywhere: most are of weights, and nothing but their numbers changes."""
    _flip(weights_of(folder, rng), rng, None)


def flip_bits_of_head(folder: Path, rng: Random) -> None:
    _flip(weights_of(folder, rng), rng, 4000)


def _flip(file: Path, rng: Random, within: int | None) -> None:
    content = bytearray(content_of(file))
    for _ in range(rng.choice((1, 1, 2, 8))):
        if content:
            content[rng.randrange(min(within or len(content), len(content)))] ^= 1 << rng.randrange(8)
    put(file, bytes(content))


def claim_head_size(folder: Path, rng: Random) -> None:
    file = weights_of(folder, rng)
    size = rng.choice((0, 1, 2, 100_000_001, 2**63, 2**64 - 1, rng.randrange(1 << 20)))
    put(file, size.to_bytes(8, "little") + content_of(file)[8:])


def write_head(file: Path, head: str | Mapping[str, Any], data: bytes) -> None:
    text = (head if isinstance(head, str) else json.dumps(head)).encode("utf-8", "surrogatepass")
    put(file, len(text).to_bytes(8, "little") + text + data)


def read_head(file: Path) -> tuple[dict[str, Any], bytes]:
    """The head of a file and its data; nothing for one that an earlier damage made unreadable."""
    content = content_of(file)
    size = int.from_bytes(content[:8], "little")
    try:
        head = json.loads(content[8 : 8 + size]) if size < len(content) else {}
    except (ValueError, RecursionError):
        head = {}
    entries = {k: v for k, v in head.items() if isinstance(v, dict)} if isinstance(head, dict) else {}
    return entries, content[8 + size :] if size < len(content) else b""


def change_head(folder: Path, rng: Random) -> None:
    """A hostile entry: its type, shape, offsets or name."""
    file = weights_of(folder, rng)
    head, data = read_head(file)
    names = sorted(set(head) - {"__metadata__"})
    if not names:
        return write_head(file, rng.choice(TEXTS), data)
    name = rng.choice(names)
    entry = dict(head[name])
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    start, end = offsets if isinstance(offsets, list) and len(offsets) == 2 else (0, 0)
    other = head[rng.choice(names)].get("data_offsets")
    changes: list[Callable[[], None]] = [
        lambda: entry.update(dtype=rng.choice(TYPES)),
        lambda: entry.update(shape=rng.choice(VALUES)),
        lambda: entry.update(shape=[rng.choice(VALUES) for _ in range(rng.randrange(6))]),
        lambda: entry.update(shape=[2**32, 2**32]),
        lambda: entry.update(shape=[0, 2**62]),
        lambda: entry.update(shape=[1] * 100 + (shape if isinstance(shape, list) else [])),
        lambda: entry.update(shape=shape[::-1] if isinstance(shape, list) else []),
        lambda: entry.update(data_offsets=rng.choice(VALUES)),
        lambda: entry.update(data_offsets=[rng.choice(VALUES), rng.choice(VALUES)]),
        lambda: entry.update(data_offsets=[end, start]),
        lambda: entry.update(data_offsets=other),
        lambda: entry.update(data_offsets=[2**63, 2**63 + 4], shape=[1], dtype="F32"),
        lambda: entry.update(data_offsets=[-4, 0], shape=[1], dtype="F32"),
        lambda: entry.pop(rng.choice(sorted(entry)), None) and None,
        lambda: entry.update(more=rng.choice(VALUES)),
    ]
    rng.choice(changes)()
    head[rng.choice((name, name, name, name, "__metadata__", "\ud800", "a\nb", ""))] = entry
    write_head(file, head, data)


def repeat_key(folder: Path, rng: Random) -> None:
    file = weights_of(folder, rng)
    head, data = read_head(file)
    pairs = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    if pairs:
        pairs.append(rng.choice(pairs))
    write_head(file, "{" + ", ".join(pairs) + "}", data)


def rename_or_drop_tensor(folder: Path, rng: Random) -> None:
    """Files that are sound and of no complete model: the data of what is dropped stay with a name of no use."""
    file = weights_of(folder, rng)
    head, data = read_head(file)
    prefix = rng.choice(("", "model.layers.", "visual.", "lm_head"))
    names = [name for name in sorted(set(head) - {"__metadata__"}) if name.startswith(prefix)]
    for name in rng.sample(names, rng.randrange(len(names) + 1)):
        new = rng.choice((f"x.{name}", name.replace("weight", "scales"), name[:-1], name.replace("0", "99999999"), ""))
        head[new] = head.pop(name)
    write_head(file, head, data)


def nonfinite_weights(folder: Path, rng: Random) -> None:
    file = weights_of(folder, rng)
    head, data = read_head(file)
    changed = bytearray(data)
    place = rng.randrange(max(1, len(data) // 4)) * 4
    changed[place : place + 400] = rng.choice((b"\xff\xff\xff\x7f", b"\x00\x00\x80\x7f")) * 100
    write_head(file, head, bytes(changed[: len(data)]))


def retype_weights(folder: Path, rng: Random) -> None:
    """All tensors as another type of the same bytes."""
    file = weights_of(folder, rng)
    head, data = read_head(file)
    dtype = rng.choice(("I32", "U32", "F32"))
    for name in rng.sample(sorted(head), rng.randrange(len(head) + 1)):
        head[name]["dtype"] = dtype
    write_head(file, head, data)


def change_index(folder: Path, rng: Random) -> None:
    """An index that leads elsewhere, or says what is not so."""
    file = folder / "model.safetensors.index.json"
    heads = {weights.name: read_head(weights)[0] for weights in sorted(folder.glob("*.safetensors"))}
    placed: dict[str, Any] = {name: found for found, head in heads.items() for name in head if name != "__metadata__"}
    how = rng.randrange(6)
    if placed and how in (0, 1):
        placed[rng.choice(sorted(placed))] = rng.choice(FILES)
    elif placed and how == 2:
        placed.pop(rng.choice(sorted(placed)))
    elif how == 3:
        placed["x.weight"] = rng.choice(sorted(heads) or ["model.safetensors"])
    elif placed and how == 4:
        bad = rng.choice(FILES)
        placed = dict.fromkeys(placed, bad)
    elif how == 5:
        return put(file, rng.choice((*TEXTS, json.dumps({"weight_map": rng.choice(VALUES)}))).encode())
    put(file, json.dumps({"metadata": {}, "weight_map": placed}).encode())


def lose_file(folder: Path, rng: Random) -> None:
    files = sorted(folder.iterdir())
    if files:
        remove(rng.choice(files))


def dangle(folder: Path, rng: Random) -> None:
    """A link to nowhere, or a folder, in the place of a file."""
    files = sorted(file for file in folder.iterdir() if not file.is_dir())
    if files:
        file = rng.choice(files)
        file.unlink()
        file.mkdir() if rng.random() < 0.5 else file.symlink_to("nowhere")


def change_json(name: str, folder: Path, rng: Random) -> None:
    """A value somewhere in a JSON file is another, is gone or is new; or the file is no JSON."""
    file = folder / name
    if rng.random() < 0.1 or not file.is_file():
        return put(file, rng.choice((rng.choice(TEXTS).encode(), b"\xff\xfe", rng.randbytes(50))))
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 2))):
        _change(content, rng)
    put(file, json.dumps(content).encode())
    return None


def _change(content: Any, rng: Random) -> None:
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
        if not keys:
            return
        key = rng.choice(keys)
        deeper = place[key]
        if not isinstance(deeper, dict | list) or not deeper or rng.random() < 0.3:
            break
        place = deeper
    how = rng.random()
    if how < 0.25:
        del place[key]
    elif how < 0.5 and isinstance(deeper, int | float):
        place[key] = rng.choice((deeper * 2, deeper + 1, -deeper, deeper * 1000, 0, deeper / 2, str(deeper)))
    else:
        place[key] = rng.choice(VALUES)


def hostile_quantization(folder: Path, rng: Random) -> None:
    """A section that says that weights are quantized, which they are not."""
    file = folder / "config.json"
    try:
        config = json.loads(content_of(file) or b"{}")
    except (ValueError, RecursionError):
        config = {}
    if not isinstance(config, dict):
        config = {}
    section: Any = {"bits": rng.choice((4, 8, 0, 1, -4, "4", None)), "group_size": rng.choice((32, 64, 0, -1, 7, "x"))}
    if rng.random() < 0.5:
        section["mode"] = rng.choice(("affine", "mxfp4", "x", 3, None, []))
    if rng.random() < 0.3:
        section[rng.choice(("language_model.lm_head", "language_model.model.embed_tokens"))] = rng.choice(VALUES)
    if rng.random() < 0.2:
        section["quant_method"] = rng.choice(("fp8", "awq", 3))
    config[rng.choice(("quantization", "quantization_config"))] = rng.choice((section, section, rng.choice(VALUES)))
    put(file, json.dumps(config).encode())


def named(function: Callable[..., None], *arguments: Any) -> Damage:
    """A damage that reports can name."""
    made = partial(function, *arguments)
    made.__name__ = "_".join((function.__name__, *map(str, arguments)))  # type: ignore[attr-defined]
    return made


ANY_WEIGHTS: list[Damage] = [
    cut_weights, extend_weights, flip_bits, flip_bits_of_head, claim_head_size, change_head, change_head, repeat_key,
    rename_or_drop_tensor, nonfinite_weights, retype_weights, lose_file, dangle,
]  # fmt: skip
CHECKPOINT_DAMAGE: list[Damage] = [
    *ANY_WEIGHTS, change_index, change_index, hostile_quantization,
    *[named(change_json, "config.json")] * 5,
    *[named(change_json, f"{name}_config.json") for name in ("preprocessor", "tokenizer", "generation")],
    *[named(change_json, name) for name in ("tokenizer.json", "chat_template.json", "processor_config.json")],
]  # fmt: skip
ADAPTER_DAMAGE: list[Damage] = [*ANY_WEIGHTS, *[named(change_json, "adapter_config.json")] * 6]


def write_adapter(folder: Path, layers: Mapping[str, tuple[int, int]], rank: int = 2) -> None:
    """A random adapter in mlx-vlm's format on layers of these (outputs, inputs)."""
    folder.mkdir(parents=True)
    rng, weights = np.random.default_rng(0), {}
    for name, (outputs, inputs) in layers.items():
        weights[f"{name}.lora_a"] = rng.standard_normal((inputs, rank)).astype(np.float32)
        weights[f"{name}.lora_b"] = rng.standard_normal((rank, outputs)).astype(np.float32)
    save_file(weights, folder / "adapters.safetensors")
    parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": sorted(layers)}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_peft(folder: Path, layers: Mapping[str, tuple[int, int]], rank: int = 2) -> None:
    """A random adapter as PEFT writes them, with the hub's names of the language model's layers."""
    folder.mkdir(parents=True)
    rng, weights = np.random.default_rng(0), {}
    for name, (outputs, inputs) in layers.items():
        place = "base_model.model.model.language_model." + name.removeprefix("language_model.model.")
        weights[f"{place}.lora_A.weight"] = rng.standard_normal((rank, inputs)).astype(np.float32)
        weights[f"{place}.lora_B.weight"] = rng.standard_normal((outputs, rank)).astype(np.float32)
    save_file(weights, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in layers})
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": targets,
        "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": None, "base_model_name_or_path": "x", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
