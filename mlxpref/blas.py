"""A fast BLAS for MLX on Linux without a GPU, found before MLX is first imported.

The `mlx[cpu]` wheel brings a reference BLAS of about 4 GFLOP/s. opencv-python, which mlx-vlm depends on, ships
an OpenBLAS with plain symbol names; opened with RTLD_GLOBAL first, it answers MLX's calls instead, some forty
times faster. The copies in numpy and scipy have prefixed symbols and cannot serve.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

__all__ = ["preload"]


def preload() -> str | None:
    """Open opencv's OpenBLAS and return its path, or None where there is none or it is not wanted.

    Does nothing off Linux, once MLX is loaded, or where MLX's CUDA build is installed.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules or _is_installed("mlx_cuda"):
        return None
    spec = importlib.util.find_spec("cv2")
    if spec is None or spec.origin is None:
        return None
    site_packages = Path(spec.origin).parent.parent
    for library in sorted(site_packages.glob("opencv_python*.libs/libopenblas*")):
        try:
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return str(library)
    return None


def _is_installed(prefix: str) -> bool:
    """Whether a distribution whose metadata folder starts with `prefix` stands beside MLX."""
    spec = importlib.util.find_spec("mlx")
    places = spec.submodule_search_locations if spec else None
    return any(True for place in places or [] for _ in Path(place).parent.glob(f"{prefix}*.dist-info"))
