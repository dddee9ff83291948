"""Conversion: a Hugging Face checkpoint becomes a quantized MLX folder, through mlx-vlm, without remote code."""

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from mlxpref.errors import ConfigError, ModelError
from mlxpref.vlm import VLM, check_folder, load_vlm

__all__ = ["BITS", "convert"]

BITS = (2, 3, 4, 5, 6, 8)
# How the libraries that write weights and tokenizers spell a full disk, each with an exception of its own.
_FULL = re.compile("no space left|unable to write", re.IGNORECASE)


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
    _refuse_quantized(source)
    _check_output(source, output, overwrite)
    final = output.resolve()
    temporary = final.with_name(f".{final.name}.partial-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    created = [folder for folder in final.parents if not folder.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _run(source, temporary, output, bits, group_size, dtype)
        quantized = _check_result(temporary, source, bits, group_size)
        _replace(temporary, final)
    except OSError as error:
        raise ModelError(f"{output}: cannot be written: {error.strerror or error}; nothing was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: the model is there
            for folder in created:
                folder.rmdir()
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return {"path": str(output), "bits": bits, "group_size": group_size, "quantized_layers": quantized, "bytes": size}


def _refuse_quantized(source: Path) -> None:
    """Refuse a quantized source: mlx-vlm would change nothing and still write that it did."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    found = config.get("quantization") or config.get("quantization_config")
    if found:
        bits = f" to {found['bits']} bit" if isinstance(found, dict) and "bits" in found else ""
        raise ModelError(f"{source}: is already quantized{bits}; convert the original checkpoint instead")


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file; give a folder to write the model into")
    if output.resolve() == source.resolve():
        raise ConfigError(f"{output}: is the source itself; give another output folder")
    if any(place.resolve().is_relative_to(output.resolve()) for place in (Path(), Path.home())):
        raise ConfigError(f"{output}: is or holds the folder you are in, or your home; give a folder of its own")
    if output.resolve() in source.resolve().parents or source.resolve() in output.resolve().parents:
        raise ConfigError(f"{output}: source and output must not lie within each other; give another output folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"{output}: is not empty; give another folder, or --overwrite to replace it")


def _run(source: Path, temporary: Path, output: Path, bits: int | None, group_size: int, dtype: str) -> None:
    """Have mlx-vlm write `temporary`; `output` is what messages call it."""
    from mlx_vlm.convert import convert as mlx_vlm_convert

    quantization = {"quantize": True, "q_bits": bits, "q_group_size": group_size} if bits else {}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            mlx_vlm_convert(str(source), str(temporary), dtype=dtype, trust_remote_code=False, **quantization)
    except Exception as error:  # mlx-vlm raises anything from KeyError to RuntimeError for a folder it cannot read
        if isinstance(error, OSError) and not str(error.filename).startswith(str(source)):
            raise
        text = " ".join(str(error).split())[:300]
        if _FULL.search(text):
            raise ModelError(f"{output}: cannot be written: no space left; free some, nothing was kept") from error
        raise ModelError(f"{source}: cannot be converted: {type(error).__name__}: {text}") from error


def _replace(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place; what was there is removed only when the new one stands."""
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    try:
        if final.exists():
            final.rename(old)
        temporary.rename(final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_result(folder: Path, source: Path, bits: int | None, group_size: int) -> int:
    """Load what was written and count its quantized layers; `source` is what messages name."""
    import mlx.nn as nn

    try:
        vlm: VLM = load_vlm(folder, max_pixels=512 * 512)
        assert vlm.words.label_ids
    except ModelError as error:
        reason = str(error).removeprefix(f"{folder}: ")
        raise ModelError(f"{source}: what was made of it cannot be used: {reason}; nothing was kept") from error
    count = sum(
        isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding) for _, module in vlm.model.named_modules()
    )
    if bits and not count:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        width = (config.get("text_config") or config).get("hidden_size")
        raise ModelError(
            f"{source}: no layer could be quantized: group size {group_size} divides no layer of this model "
            f"(hidden size {width}); give a smaller --group-size"
        )
    return count
