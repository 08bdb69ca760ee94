"""The files of experiments, and what they say."""

import re
import statistics
from pathlib import Path

import pytest
import torch

import eit
from eit.errors import UserError
from eit.reproduce import experiment as experiments
from tests.reproduce.conftest import TINY

ROOT = Path(__file__).parents[2]
MATRICES = [name for name in experiments.experiment_names() if not experiments.load(name).of]
BUDGETS = [(name, budget) for name in MATRICES for budget in experiments.load(name).budgets]


def test_every_experiment_of_the_package_is_read():
    assert experiments.experiment_names() == ["small_data", "ablation", "pooling", "frequency", "diversity", "imagenet"]
    assert all(experiments.load(name).claims for name in experiments.experiment_names())


@pytest.mark.parametrize(("name", "budget"), BUDGETS)
def test_every_run_has_a_recipe_and_a_name_of_its_own(name, budget):
    folders = [cell.recipe(Path("results"), {}).out for cell in experiments.load(name).cells(budget)]
    assert len(set(folders)) == len(folders) > 0


@pytest.mark.parametrize("budget", ["smoke", "short", "medium", "full"])
def test_models_of_small_data_differ_in_what_their_names_say_alone(budget):
    found = experiments.load("small_data").cells(budget)
    recipes = {cell.name: cell.recipe(Path("results"), {}).model_dump() for cell in found}
    for cell in found:
        if cell.levels["model"] not in ("eit", "resnet"):
            own = recipes[cell.name]
            twin = recipes[cell.name.replace(cell.levels["model"], "eit")]
            assert own["model"] | dict(family="eit", cls_conv=None, schedule=None) == twin["model"]
            assert {k: v for k, v in own.items() if k not in ("model", "out")} == {
                k: v for k, v in twin.items() if k not in ("model", "out")
            }


def test_the_paper_s_sizes():
    """The full budget has the paper's 3.08 M and 0.212 G, and the ResNet its ratio; short ones at most 96 channels."""
    for cell in experiments.load("small_data").cells("full"):
        model = cell.values["model"]
        assert (
            model["name"] == "timm/resnet24_small"
            or [model[key] for key in ("embed_dim", "depth", "num_heads")] == [None] * 3
        ), "eit_mini's own 250, 5, 10"
    assert all(cell.values["model"]["embed_dim"] <= 96 for cell in experiments.load("small_data").cells("short"))
    small = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, num_classes=10)
    with torch.device("meta"):
        models = eit.create_model("eit_mini", **small), eit.create_model("timm/resnet24_small", num_classes=10)
    ours, theirs = (eit.complexity(model, (3, 32, 32)) for model in models)
    assert ours.params / theirs.params == pytest.approx(0.177, abs=0.0005)
    assert ours.macs < theirs.macs


@pytest.mark.parametrize("budget", ["smoke", "short", "full"])
def test_schedules_of_the_ablation_have_equal_mean_shares(budget):
    arms = {}
    for cell in experiments.load("ablation").cells(budget):
        model = cell.recipe(Path("results"), {}).model
        with torch.device("meta"):
            arms[cell.levels["variant"]] = eit.create_model(model.name, img_size=32, **model.arguments())
    shares = {name: statistics.mean(arm.attn_channels) for name, arm in arms.items()}
    assert shares["eit"] == shares["increasing"] == shares["constant"]
    assert len(set(arms["constant"].attn_channels)) == 1
    assert shares["no_convolution"] == arms["eit"].embed_dim
    assert budget != "full" or arms["constant"].attn_channels == [150] * 5


def test_claims_name_files_and_code_that_exist():
    for name in experiments.experiment_names():
        for claim in experiments.load(name).claims.values():
            file, _, symbol = claim.code.partition(", ")
            found = list((ROOT / "src" / "eit").glob(file))
            assert found, claim.code
            assert not symbol or re.search(rf"\b{symbol}\b", found[0].read_text()), claim.code


def test_claims_speak_of_levels_and_metrics_that_are_measured():
    for name in experiments.experiment_names():
        experiment = experiments.load(name)
        for claim in experiment.claims.values():
            assert set(claim.levels) <= set(experiment.runs.axes[claim.axis])
            assert experiment.runs.measure.has(claim.metric)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shows: x", "refuted"),
        (TINY.replace("rises: [vit, eit]", "rises: [eit]"), "claims.dearer.rises"),
        (TINY.replace("rises: [vit, eit]", ""), "a claim has one of rises, equal and reaches"),
        (
            TINY.replace("rises: [vit, eit]", "equal: [vit, eit]"),
            "equal needs within, its margin; rises does not take it",
        ),
        (
            TINY.replace("rises: [vit, eit]", "rises: [vit, eit], within: 1"),
            "equal needs within, its margin; rises does not take it",
        ),
        (TINY.replace("recipe: digits", "control: vat\nrecipe: digits", 1), "control=vat: model has no such level"),
        (TINY.replace("cost: seconds", "cost: seconds\n    levels: {model: [vat]}"), "model=vat"),
        (TINY.replace("cost: seconds", "cost: seconds\n    adjust: {vat: {seed: 1}}"), "adjusts vat"),
        (TINY.replace("measure: {", "measure: {analyse: 3, "), "measure.analyse"),
        (TINY.replace("axis: model", "axis: modle"), "claims.dearer.axis=modle"),
        (TINY.replace("rises: [vit, eit]", "rises: [vit, swin]"), "model has no swin"),
        (TINY.replace("metric: macs", "metric: macks"), "claims.dearer.metric=macks is not measured"),
        (TINY.replace("metric: macs", "metric: kept.75"), "metric=kept.75 is not measured"),
        (TINY.partition("axes:")[0], "axes and budgets"),
        ("shows: x\nrefuted: y\naxes: [1]", "axes"),
        ("- 1", "is not an experiment"),
        (TINY.replace("seed: [0, 1]", "seed: []"), "axes.seed has no levels"),
        (TINY.replace("cost: seconds", "cost: seconds\n    levels: {model: []}"), "a budget has no levels of model"),
        ("shows: x\nrefuted: y\nof: small_data", "claims are needed"),
        (TINY.replace("    vit: {", "    ../vit: {"), "'../vit'"),
        (TINY.replace("shows:", "name: a/b\nshows:"), "'a/b'"),
        (TINY.replace("shows:", "name: frequency\nshows:"), "another name"),
        (TINY.replace("cost: seconds\n    set:", "cost: seconds\n    set:\n      out: here"), "out cannot be set"),
        (
            TINY.replace("{digits: {}}", "{x-eit: {}, x: {}}").replace("    vit:", "    eit-eit:"),
            "called x-eit-eit-seed",
        ),
        ("shows: x\nrefuted: y\nof: frequency\nclaims:" + TINY.partition("claims:")[2], "axes and budgets"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused_in_one_line(tmp_path, text, said):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        experiments.load(str(file))
    assert "\n" not in str(error.value)
