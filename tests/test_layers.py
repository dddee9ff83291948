"""The import table: who may import whom, and who may touch mlx-vlm; nothing heavy at start-up."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlxpref"

# Bottom up: a module imports from lower layers, or from an earlier place in its own.
LAYERS = [
    ["errors", "blas"],
    [
        "config",
        "files",
        "template",
        "preferences",
        "verdict",
        "archives",
        "unpacking",
        "store",
        "posterior",
        "ranking",
        "pairing",
        "rewards",
        "safetensors_files",
        "model_config",
        "layouts",
        "shapes",
        "memory",
        "images",
        "comfy",
        "image_metadata",
        "duplicates",
        "prompts",
        "console",
        "rescaling",
        "calibration_file",
        "pairs",
        "metrics",
        "protocols",
        "scores",
        "image_ranking",
        "remarks",
        "contest",
        "ranking_files",
        "report",
        "reliability",
        "long_runs",
        "checkup",
        "run_log",
        "run_curves",
        "run_page",
        "ranking_page",
        "lessons",
        "own_reward",
        "stopwatch",
        "heartbeat",
    ],
    [
        "demo",
        "demo.pictures",
        "demo.preferences",
        "label",
        "label.records",
        "label.rater",
        "label.sheets",
        "label.questions",
        "label.pictures",
        "label.labelling",
        "label.server",
        "datasets.catalog",
        "datasets.jsonl",
        "datasets.rows",
        "datasets.portions",
        "datasets.table",
        "datasets.folders",
        "datasets.imagereward",
        "datasets.hpdv2",
        "datasets.pickapic",
        "datasets.hpdv3",
        "datasets",
        "downloads",
        "transfers",
        "hub_models",
        "models",
        "advice",
        "options",
    ],
    ["lora", "grpo", "machines", "company", "shared_store"],
    ["model_folder", "model_checks", "tokens", "prefix", "recompute", "trunk", "tower", "features"],
    ["vlm", "fingerprint", "tree"],
    ["rollout", "scoring", "objective", "update", "earnings", "groups", "learning", "judge"],
    ["identity", "peft", "adapters", "fusing", "quantization", "fidelity", "verification", "conversion"],
    ["recipe_comparison", "model_card", "export"],
    ["calibration", "expectation", "loading"],
    ["evaluation", "strategies", "held_out", "step_report", "training"],
    ["checkpoints", "run_record", "run_files", "runs"],
    ["tables", "strategy_table", "session", "demo.story"],
    ["device_checks", "place_checks", "judge_checks", "doctor"],
    [
        "cli_calibrate",
        "cli_strategies",
        "cli_judging",
        "cli_ranking",
        "cli_training",
        "cli_models",
        "cli_data",
        "cli_label",
        "cli_doctor",
        "cli",
    ],
    [""],
]
"""The package itself ("") is the Python interface: it stands above what it loads."""
HEIGHT = {name: (i, j) for i, layer in enumerate(LAYERS) for j, name in enumerate(layer)}
NO_MODEL = {name for layer in LAYERS[:3] for name in layer}
MLX_VLM = {"vlm", "prefix", "conversion"}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Every module that a file imports; with `top_level`, only what it imports when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if not top_level else [n for s in tree.body if not is_deferred(s) for n in ast.walk(s)]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
    return names


def is_deferred(statement: ast.stmt) -> bool:
    """Whether a statement's imports do not run on import: a definition, or an `if TYPE_CHECKING` block."""
    if isinstance(statement, ast.If):
        return "TYPE_CHECKING" in ast.unparse(statement.test)
    return isinstance(statement, ast.FunctionDef | ast.ClassDef)


def own(names: set[str]) -> set[str]:
    return {name.removeprefix("mlxpref").removeprefix(".") for name in names if name.split(".")[0] == "mlxpref"}


def test_every_module_has_a_layer() -> None:
    assert set(modules()) == set(HEIGHT)


@pytest.mark.parametrize("name", sorted(HEIGHT))
def test_imports_point_down(name: str) -> None:
    lower = own(imports(modules()[name]))
    assert {other for other in lower if HEIGHT[other] >= HEIGHT[name]} == set()


def test_only_the_seam_imports_mlx_vlm() -> None:
    touching = {name for name, path in modules().items() if any(i.split(".")[0] == "mlx_vlm" for i in imports(path))}
    assert touching <= MLX_VLM


def test_modules_below_the_model_never_see_one() -> None:
    for name in NO_MODEL:
        top_level = imports(modules()[name], top_level=True)
        assert {i for i in top_level if i.split(".")[0] in ("mlx", "mlx_lm", "transformers", "torch")} == set(), name


def test_no_private_name_crosses_a_module() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not any(alias.name.startswith("_") for alias in node.names), name


@pytest.mark.parametrize("folder", ["convert", "scripts"])
def test_the_package_never_imports_what_is_not_installed(folder: str) -> None:
    for path in modules().values():
        assert folder not in {name.split(".")[0] for name in imports(path)}


def test_the_parser_sees_imports() -> None:
    """The checks above cannot pass because nothing was found."""
    assert "judge" in own(imports(PACKAGE / "evaluation.py"))
    assert any(name.startswith("mlx_vlm") for name in imports(PACKAGE / "vlm.py"))
    assert sys.version_info >= (3, 11)
