"""The plan of an experiment as commands."""

import shlex
from pathlib import Path

import pytest

from eit.config import load_recipe
from eit.reproduce import experiment as experiments
from eit.reproduce import plan as reproduce_plan
from eit.reproduce.plan import plan_runs
from tests.helpers.commands import run_eit


def test_the_plan_s_commands_make_the_recipes(monkeypatch):
    counted = reproduce_plan.macs_per_image
    for name, budget in (("small_data", "full"), ("ablation", "short"), ("imagenet", "full")):
        runs = experiments.load(name).cells(budget)
        # Counting MACs takes a third of a second for each of 39 models; those of ImageNet are compared with the page's
        count = counted if name == "imagenet" else lambda section, size, classes: len(section)
        monkeypatch.setattr(reproduce_plan, "macs_per_image", count)
        plan = plan_runs(runs, Path("results"), {}, 1000.0)
        for cell, planned in zip(runs, plan, strict=True):
            words = shlex.split(planned.command)
            start = words.index("train") + 1
            assert load_recipe(words[start], words[start + 1 :]) == cell.recipe(Path("results"), {})
            rate = 1000.0 * plan[0].training_macs / plan[0].images
            assert planned.hours == pytest.approx(planned.training_macs / rate / 3600)
    assert (
        f"{sum(run.training_macs for run in plan) / 1e18:.1f}e18 MACs"
        in experiments.load("imagenet").budgets["full"].cost
    )
    text = run_eit("reproduce", "plan", "imagenet", "--images-per-s", "8000").stdout
    assert text.startswith("torchrun --nproc-per-node=8 -m eit train imagenet_mini") and "per run)" in text
