"""Imports go one way: from the ground floor up, package by package, and inside each package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import eit

SOURCE = Path(eit.__file__).parent
# The floors of the house, lowest first; a module or package imports from lower floors only.
FLOORS = [
    {"errors", "imports"},
    {"files"},
    {"plain_yaml", "hub_access"},
    {"config", "distributed", "memory", "operators", "precision", "randomness"},
    {"console", "environment"},
    {"plots"},
    {"pages"},
    {"models"},
    {"data"},
    {"weights"},
    {"inference"},
    {"training"},
    {"analysis"},
    {"demo", "export", "report", "reproduce"},
    {"benchmark"},
    {"cli"},
    {"__main__", "__init__"},
]
# The same inside each package.
ROOMS = {
    "pages": [{"__init__", "render"}],
    "models": [{"ops"}, {"__init__", "eit"}, {"registry", "complexity"}],
    "data": [
        {"__init__", "shear", "images", "order"},
        {"folders", "random_crop"},
        {"layouts", "augment"},
        {"timm_datasets"},
        {"workers"},
        {"prefetch"},
        {"streaming"},
        {"datasets", "loaders", "prepare_imagenet"},
        {"shards"},
    ],
    "weights": [{"__init__", "card"}, {"formats"}, {"compatibility"}, {"convert"}, {"load"}],
    "inference": [{"__init__", "exported_models", "evaluation_data", "confusion"}, {"evaluate"}, {"predict"}],
    "training": [
        {"__init__", "step_reports", "signals", "optim", "loss", "checkpoint", "folder_lock"},
        {"run_folder"},
        {"setup", "global_batch"},
        {"choices"},
        {"trainer", "preview", "baselines"},
        {"lr_finder"},
        {"train"},
    ],
    "analysis": [
        {"__init__", "moments"},
        {"frequency", "class_token"},
        {"attention", "smoothing", "transfer"},
        {"hooks"},
        {"measure", "image_maps", "filters"},
        {"inputs", "robustness"},
        {"analyzed_model"},
        {"groups", "panels"},
        {"accuracy_figures", "attention_figures", "frequency_figures", "token_figures"},
        {"figures"},
        {"compare", "findings", "tables"},
        {"report"},
    ],
    "report": [{"__init__", "advice"}, {"outcome"}, {"mistakes", "run"}],
    "export": [{"__init__", "hub"}, {"exporter"}],
    "demo": [{"__init__", "explanation", "examples"}, {"page"}],
    "benchmark": [{"__init__", "matmul_peak", "naive"}, {"bench"}, {"sections", "self_check"}],
    "reproduce": [
        {"__init__", "experiment", "published"},
        {"runs", "plan"},
        {"verdict"},
        {"tables", "forest"},
    ],
    "cli": [
        {"output", "help"},
        {"options"},
        {"recipes"},
        {
            "analyze",
            "bench",
            "convert",
            "data",
            "demo",
            "eval",
            "export",
            "lr",
            "models",
            "predict",
            "push",
            "report",
            "reproduce",
        },
        {"train"},
        {"app"},
        {"__init__"},
    ],
}
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def imported(file, top_level_only):
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{a.name}" for a in node.names) if node.module == "eit" else [node.module]


def test_every_module_has_its_layer():
    packages = {folder.parent.name for folder in SOURCE.glob("*/__init__.py")}
    assert {file.stem for file in SOURCE.glob("*.py")} | packages == set(LEVEL)
    assert packages == set(ROOMS)
    for package, layers in ROOMS.items():
        assert {file.stem for file in (SOURCE / package).glob("*.py")} == set().union(*layers)


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_down(file):
    within = file.parent.name if file.parent != SOURCE else None
    own = LEVEL[within or file.stem]
    inner = {name: level for level, names in enumerate(ROOMS.get(within, ())) for name in names}
    for name in imported(file, top_level_only=False):
        package, module, *part = (*name.split("."), "")[:3]
        if package != "eit" or module not in LEVEL or file == SOURCE / "__init__.py":
            continue
        if module == within:
            if part != [""]:
                assert inner[part[0]] < inner[file.stem], f"{file.stem} imports {name}"
        else:
            assert LEVEL[module] < own, f"{file.stem} imports {module}"


def test_the_model_needs_torch_and_timm_layers_alone():
    allowed = ("torch", "timm.layers", "collections.abc", "typing", "eit.models")
    for file in ("models/eit.py", "models/ops.py"):
        assert not [n for n in imported(SOURCE / file, top_level_only=False) if not n.startswith(allowed)]


HEAVY = ("torch", "torchvision", "timm", "numpy", "PIL", "matplotlib", "sklearn", "pydantic", "yaml", "rich", "gradio")
LIGHT = ("eit", "eit.errors", "eit.files", "eit.imports", "eit.cli")  # of the package


@pytest.mark.parametrize("file", sorted((SOURCE / "cli").glob("*.py")), ids=lambda file: file.stem)
def test_a_command_imports_nothing_heavy_before_it_runs(file):
    names = list(imported(file, top_level_only=True))
    assert not [name for name in names if name.split(".")[0] in HEAVY]
    own = [name for name in names if name.split(".")[0] == "eit"]
    assert not [name for name in own if name not in LIGHT and not name.startswith("eit.cli.")]


def test_the_command_is_quick_to_start():
    code = f"import sys, eit.cli; loaded = set(sys.modules) & set({HEAVY}); sys.exit(', '.join(loaded) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
