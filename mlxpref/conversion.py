"""Conversion: a Hugging Face checkpoint becomes a quantized MLX folder, through mlx-vlm, without remote code."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from mlxpref.errors import ConfigError, ModelError
from mlxpref.vlm import VLM, check_folder, load_vlm

__all__ = ["BITS", "convert"]

BITS = (2, 3, 4, 5, 6, 8)


def convert(
    source: Path,
    output: Path,
    bits: int | None = 4,
    group_size: int = 64,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint folder and return what was written: path, bits, layers quantized, bytes.

    `bits` None keeps the weights unquantized. The vision tower stays in `dtype`. The folder is written beside
    `output` under another name, loaded again and checked, and only then renamed. Raises ModelError for a source
    that cannot be converted, ConfigError for an output that is in the way.
    """
    check_folder(source)
    _check_output(source, output, overwrite)
    temporary = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        _run(source, temporary, bits, group_size, dtype)
        quantized = _check_result(temporary, bits, group_size)
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return {"path": str(output), "bits": bits, "group_size": group_size, "quantized_layers": quantized, "bytes": size}


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file; give a folder to write the model into")
    if output.resolve() == source.resolve():
        raise ConfigError(f"{output}: is the source itself; give another output folder")
    if output.resolve() in source.resolve().parents or source.resolve() in output.resolve().parents:
        raise ConfigError(f"{output}: source and output must not lie within each other; give another output folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"{output}: is not empty; give another folder, or --overwrite to replace it")


def _run(source: Path, output: Path, bits: int | None, group_size: int, dtype: str) -> None:
    from mlx_vlm.convert import convert as mlx_vlm_convert

    quantization = {"quantize": True, "q_bits": bits, "q_group_size": group_size} if bits else {}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            mlx_vlm_convert(str(source), str(output), dtype=dtype, trust_remote_code=False, **quantization)
    except OSError as error:
        raise ModelError(f"{output}: cannot be written: {error.strerror or error}; nothing was kept") from error
    except Exception as error:  # mlx-vlm raises anything from KeyError to RuntimeError for a folder it cannot read
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"{source}: cannot be converted: {type(error).__name__}: {text}") from error


def _check_result(folder: Path, bits: int | None, group_size: int) -> int:
    """Load what was written and count its quantized layers."""
    import mlx.nn as nn

    vlm: VLM = load_vlm(folder, max_pixels=512 * 512)
    assert vlm.words.label_ids
    count = sum(
        isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding) for _, module in vlm.model.named_modules()
    )
    if bits and not count:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        width = (config.get("text_config") or config).get("hidden_size")
        raise ModelError(
            f"no layer could be quantized: group size {group_size} divides no layer of this model "
            f"(hidden size {width}); give a smaller --group-size"
        )
    return count
