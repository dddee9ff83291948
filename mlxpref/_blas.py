"""A fast BLAS for MLX on Linux without a GPU, found before MLX is first imported.

The `mlx[cpu]` wheel brings a reference BLAS of about 4 GFLOP/s. opencv-python, which mlx-vlm depends on, ships
an OpenBLAS with plain symbol names; opened with RTLD_GLOBAL first, it answers MLX's calls instead, some forty
times faster. The copies in numpy and scipy have prefixed symbols and cannot serve.
"""

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path


def preload() -> str | None:
    """Open opencv's OpenBLAS and return its path; None if there is none or no need.

    It does nothing off Linux, after MLX is loaded, or with MLX's CUDA build.
    """
    library = _opened()
    return library._name if library else None


def blas_in_use() -> dict[str, int | str | None]:
    """Threads and kernels of the opened BLAS, or None; the last bits of products depend on both."""
    library = _opened()
    if library is None:
        return {"blas_threads": None, "blas_kernels": None}
    library.openblas_get_corename.restype = ctypes.c_char_p
    kernels: bytes = library.openblas_get_corename()
    return {"blas_threads": int(library.openblas_get_num_threads()), "blas_kernels": kernels.decode()}


@cache
def _opened() -> ctypes.CDLL | None:
    """The library, opened at the first call."""
    if sys.platform != "linux" or "mlx.core" in sys.modules or _is_installed("mlx_cuda"):
        return None
    spec = importlib.util.find_spec("cv2")
    if spec is None or spec.origin is None:
        return None
    site_packages = Path(spec.origin).parent.parent
    for path in sorted(site_packages.glob("opencv_python*.libs/libopenblas*")):
        try:
            return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    return None


def _is_installed(prefix: str) -> bool:
    """Whether there is a distribution next to MLX whose metadata folder starts with `prefix`."""
    spec = importlib.util.find_spec("mlx")
    places = spec.submodule_search_locations if spec else None
    return any(True for place in places or [] for _ in Path(place).parent.glob(f"{prefix}*.dist-info"))
