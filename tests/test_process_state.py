"""The library leaves the process of its caller unchanged; the test runs in a new process."""

import gc
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

REWARD = "import math\nprint('loaded')\ndef length(texts, **other):\n    return [math.log1p(len(t)) for t in texts]\n"


def state() -> dict[str, Any]:
    """What a caller set up in its process."""
    import matplotlib as mpl

    return {
        "backend": mpl.get_backend(),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "logging": [(each.level, list(each.handlers)) for each in map(logging.getLogger, ("", "mlxpref"))],
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "environment": dict(os.environ),
        "paths": (list(sys.path), Path.cwd()),
    }


def draws() -> list[float]:
    """The next number of each of the caller's generators."""
    import mlx.core as mx

    return [random.random(), float(np.random.random()), float(mx.random.uniform().item())]


def seed() -> None:
    import mlx.core as mx

    random.seed(1)
    np.random.seed(1)
    mx.random.seed(1)


def use(folder: Path) -> None:
    """Load, rank and train, with a reward of the caller's own and a page."""
    import mlxpref
    from mlxpref.demo.pictures import PictureSpec, render

    judge = mlxpref.load("demo", think=False)
    pictures = [
        render(PictureSpec(each, "green", "blue", "red"), np.random.default_rng(0)) for each in ("red", "blue", "green")
    ]
    judge.rank(pictures, "a red circle")
    few: dict[str, Any] = {"limit": 8, "steps": 2, "comparisons": 2, "group": 2, "max_tokens": 48}
    reward = f"soft=1,{folder / 'rewards.py'}:length=0.1"
    reports = list(mlxpref.train("demo", "demo", folder / "run", reward=reward, **few))
    assert any(report.updated for report in reports)
    assert (folder / "run" / "report.html").is_file()


def main(folder: Path) -> None:
    """Compare before with after."""
    import matplotlib as mpl

    import mlxpref  # noqa: F401

    # At their import, mlx-vlm sets an environment variable and rich draws a random number: these are not ours.
    import mlx_vlm  # noqa: F401  isort: skip
    import rich.console  # noqa: F401

    mpl.use("pdf")
    (folder / "rewards.py").write_text(REWARD)
    seed()
    expected = draws()
    seed()
    before = state()
    use(folder)
    after = state()
    assert before == after, {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert draws() == expected
    files = [str(getattr(module, "__file__", "")) for module in list(sys.modules.values())]
    assert not [file for file in files if file.startswith(str(folder))]


def test_process_state_is_unchanged(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
