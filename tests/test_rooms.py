"""The packages stand in an order: each imports only what it may, and nothing imports upward."""

import ast
from pathlib import Path

import mlxpref

ROOT = Path(mlxpref.__file__).parent
TOP = ["_blas", "errors", "text", "files", "lru", "log", "disk_cache", "config", "preferences", "verdict", "hub"]
TOP += ["distributed", "power", "web"]
ENTRIES = ("__init__", "__main__")
"""What the user imports or runs: they may import everything."""
MAY_IMPORT = {
    "ranking": "",
    "demo": "",
    "data": "demo",
    "checkpoints": "demo",
    "engine": "data checkpoints",
    "judge": "ranking demo data checkpoints engine",
    "report": "ranking data judge",
    "training": "demo data checkpoints engine judge report",
    "conversion": "demo data checkpoints engine",
    "label": "ranking data report",
    "reward": "ranking data engine judge",
    "serve": "data engine judge reward",
    "cli": "ranking demo data checkpoints engine judge report training conversion label reward serve",
}


def test_imports_of_rooms() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        allowed = TOP[: TOP.index(room)] if room in TOP else [*TOP, room, *MAY_IMPORT.get(room, "").split()]
        for node in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)):
            for name in {getattr(node, "module", None) or alias.name for alias in node.names}:
                first, _, rest = name.partition(".")
                upward = first == "mlxpref" and room not in ENTRIES and rest.partition(".")[0] not in allowed
                model = first == "mlx_vlm" and room not in ("engine", "conversion")
                if upward or model or (first in ("mlx", "PIL") and room == "ranking"):
                    wrong.append(f"{path}: {name}")
    assert not wrong
    assert {path.stem for path in ROOT.glob("*.py")} == {*TOP, *ENTRIES}
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == {*MAY_IMPORT}
