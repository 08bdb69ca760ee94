"""Several runs as one curve with a band, and groups of runs paired by seed."""

import csv
import json
import shutil
from statistics import fmean

import pytest
import torch
from scipy import stats

import eit
from eit.analysis.analyzed_model import AnalyzedModel, curves
from eit.analysis.figures import figures
from eit.analysis.findings import faults, layer_table, sentences, token_table
from eit.analysis.groups import MEASURES, paired_differences, spreads
from eit.analysis.inputs import LoadedModel, expand_groups, load_models
from eit.analysis.measure import analyze
from eit.config import load_recipe
from eit.data.images import Preprocessing
from eit.errors import UserError
from eit.training.trainer import train
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits
from tests.helpers.training import TINY

VIEW = Preprocessing(32, 32, "bicubic", (0.5,) * 3, (0.5,) * 3)


def seeded(number):
    """A class of models with a seed, without a card."""
    return type("Seeded", (LoadedModel,), dict(seed=number))


def run_of(group, seed, state="trained", colour="#0072b2", **arguments):
    torch.manual_seed(seed)
    arguments = dict(embed_dim=24, depth=3, num_heads=4, num_classes=5) | arguments
    model = eit.EIT(32, 3, 1, 4, **arguments).eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    loaded = seeded(seed)(f"{group}{seed}", state, None, VIEW, f"runs/{group}{seed}", group=f"runs/{group}*")
    return AnalyzedModel(loaded, analyze(model, x), colour, "o")


@pytest.fixture(scope="module")
def groups():
    """Three seeds of EIT with their initial values, three of ViT, two of them in common, and one run alone."""
    found = []
    for seed in (1, 2, 3):
        found += [run_of("eit", seed), run_of("eit", seed, "initial")]
    found += [run_of("vit", seed, colour="#d55e00", schedule="vit") for seed in (2, 3, 4)]
    alone = run_of("flat", 5, schedule="lsra")
    alone.loaded.group = ""
    return [*found, alone]


# -- Names ------------------------------------------------------------------------------------------------------------


def test_a_pattern_is_all_weights_that_match_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a-1", "a-2", "a-3", "b-1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "a-3":
            (tmp_path / "runs" / name / "best.safetensors").touch()
    assert expand_groups(["runs/a-*", "digits", "runs/b-*"], tell=True) == [
        ("runs/a-1", "runs/a-*"),
        ("runs/a-2", "runs/a-*"),
        ("digits", ""),
        ("runs/b-1", ""),
    ]
    assert "runs/a-3 is not a run folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="no weights file.* matches runs/c-"):
        expand_groups(["runs/c-*"])
    (tmp_path / "odd[1]").mkdir()
    assert expand_groups(["odd[1]"]) == [("odd[1]", "")]  # a name, not a pattern


# -- Curves -----------------------------------------------------------------------------------------------------------


def test_runs_of_a_group_are_one_curve_by_state(groups):
    found = curves(groups)
    assert [(one.name, len(one.members)) for one in found] == [
        ("runs/eit*, n = 3", 3),
        ("runs/eit*, n = 3 (initial)", 3),
        ("runs/vit*, n = 3", 3),
        ("flat5", 0),
    ]
    assert found[0].at_initial_values(found) is found[1] and found[3].runs == [found[3]]
    mean = sum(one.analysis.layers_at("block")[0].share for one in groups[:6:2]) / 3
    assert found[0].mean(lambda a: a.layers_at("block")[0].share) == pytest.approx(mean)


def test_lines_are_means_and_bands_deviations_over_runs(groups):
    from matplotlib.figure import Figure

    (figure,) = (f for f in figures(groups) if f.key == "smoothing")
    axis = Figure().subplots()
    figure.panels[0].draw(axis)
    runs = torch.tensor([[s.cosine for s in one.analysis.smoothing] for one in groups[:6:2]])
    assert axis.lines[0].get_ydata() == pytest.approx(runs.mean(dim=0), rel=1e-5)
    band = axis.collections[0].get_paths()[0].vertices
    for layer in range(4):
        ends = sorted(y for x, y in band if x == layer)
        expected = [(runs[:, layer].mean() + sign * runs[:, layer].std()).item() for sign in (-1, 1)]
        assert (ends[0], ends[-1]) == pytest.approx(expected, rel=1e-4)
    assert len(axis.lines) == 4 and len(axis.collections) == 3
    assert "band of ± one standard deviation over the runs" in figure.caption


def test_the_table_of_layers_has_the_means_over_layers_and_runs_one_row_per_curve(groups):
    head, rows = layer_table(groups)
    assert [row[0] for row in rows] == [one.name for one in curves(groups)]
    for row, runs in zip(rows, (groups[:6:2], groups[1:6:2], groups[6:9], groups[9:]), strict=True):
        cells = dict(zip(head, row, strict=True))
        for name, kind in (("share", "share"), ("with DC", "share_with_dc")):
            expected = [fmean(getattr(f, kind) for f in run.analysis.layers_at("block")) for run in runs]
            assert cells[name] == f"{100 * fmean(expected):.1f}%"
        std = fmean(fmean(layer.std for layer in run.analysis.attention) for run in runs)
        assert cells["tokens"] == "8x8, 4 px" and cells["diversity"] == f"{std:.2f} px"


def test_the_table_of_groups_has_mean_and_deviation_over_runs(groups):
    found = {(s.group, s.state, s.measure, s.layer): s for s in spreads(groups)}
    assert {key[:2] for key in found} == {("runs/eit*", "trained"), ("runs/eit*", "initial"), ("runs/vit*", "trained")}
    values = torch.tensor([one.analysis.attention[1].relative_std for one in groups[6:9]], dtype=torch.float64)
    one = found["runs/vit*", "trained", "relative_std", 2]
    assert (one.runs, one.mean, one.std) == (3, pytest.approx(values.mean().item()), pytest.approx(values.std().item()))
    assert {key[2] for key in found} == set(MEASURES)


# -- Pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_are_runs_of_one_seed_and_the_interval_is_students(groups):
    found, lines = paired_differences(groups)
    assert lines == [] and {(p.one, p.other, p.seeds) for p in found} == {("runs/eit*", "runs/vit*", 2)}
    ours, theirs = ([groups[i].analysis.layers_at("block")[1].share for i in where] for where in ((2, 4), (6, 7)))
    (pair,) = (p for p in found if p.measure == "share" and p.layer == 2)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (pair.low, pair.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert pair.difference == pytest.approx(sum(a - b for a, b in zip(ours, theirs, strict=True)) / 2)
    assert pair.is_clear == (expected.low > 0 or expected.high < 0)
    (mean,) = (p for p in found if p.measure == "share" and p.layer is None)
    layers = [p.difference for p in found if p.measure == "share" and p.layer is not None]
    assert mean.difference == pytest.approx(sum(layers) / 3)
    words = " ".join(sentences(groups))
    assert "runs/eit* minus runs/vit*, share, mean of the layers: " in words and "2 seeds" in words
    assert any(f.key == "paired" for f in figures(groups)) and not any(f.key == "paired" for f in figures(groups[:1]))


def test_groups_that_cannot_be_paired_get_a_line(groups):
    others = [run_of("vit", seed, schedule="vit") for seed in (3, 7)]
    assert paired_differences([*groups[:6], *others]) == (
        [],
        ["runs/eit* and runs/vit* are not paired: they have 1 seed in common"],
    )
    twice = [run_of("vit", 3, schedule="vit") for _ in range(2)]
    (line,) = paired_differences([*groups[:6], *twice])[1]
    assert line.startswith("runs/eit* and runs/vit* are not paired: ")
    assert line in sentences([*groups[:6], *twice])


def test_a_group_is_named_in_faults_and_tables_once(groups):
    lines = faults(groups)
    assert sum(line.startswith("runs/eit*, n = 3: the class token hardly") for line in lines) == 1
    assert [row[0] for row in token_table(groups)[1]] == [one.name for one in curves(groups)]


# -- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    data = save_digits(folder / "data")
    for family in ("eit", "vit"):
        for seed in (0, 1):
            out = folder / "runs" / f"{family}-{seed}"
            family_of = ["model.family=vit", "model.patch_size=4"] if family == "vit" else []
            train(load_recipe("cifar10", [*TINY, *family_of, f"seed={seed}", f"data.root={data}", f"out={out}"]))
    return folder


def read(folder, name):
    with open(folder / "csv" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_two_groups_from_the_command_line_to_the_page(world, no_figure_files):
    words = ("analyze", "runs/eit-*", "runs/vit-*", "--data", "data", "--pictures", "1", "--filters", "--out", "two")
    done = run_eit(*words, cwd=world)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(" runs/eit-*, n = 2 ")]
    assert len(rows) == 2 * 2 and "eit-0" not in done.stdout, "trained and initial, in both tables"
    rows = read(world / "two", "models")
    assert {(r["model"], r["group"], r["seed"]) for r in rows if r["state"] == "trained"} == {
        (f"{family}-{seed}", f"runs/{family}-*", str(seed)) for family in ("eit", "vit") for seed in (0, 1)
    }
    paired = {(r["measure"], r["layer"]) for r in read(world / "two", "paired")}
    assert {("share", "1"), ("share", "mean"), ("class_token_share", "2")} <= paired
    assert {r["runs"] for r in read(world / "two", "groups")} == {"2"}
    assert len(read(world / "two", "uses")) == 4 * 2 * 2  # runs, layers, sides
    page = (world / "two" / "report.html").read_text()
    for key in ("class_token", "sweep", "transfer", "smoothing", "filter", "uses", "paired"):
        assert f'id="{key}"' in page
    assert "paired by seed" in page and page.count("<h4>runs/") == 0


def test_the_numbers_as_json_say_what_is_wrong(world, no_figures):
    done = run_eit("analyze", "runs/eit-0", "--data", "data", "--json", "--pictures", "0", "--out", "one", cwd=world)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert any("diversity is not testable" in line for line in found["faults"])
    model = found["models"][0]
    rows = [
        r
        for r in read(world / "one", "class_token")
        if (r["state"], r["where"], r["part"]) == ("trained", "block", "all")
    ]
    assert [float(r["image_share"]) for r in rows] == model["class_token_share"]
    page = (world / "one" / "report.html").read_text()
    assert page.index("Warnings") < page.index("Findings") and "the class token hardly depends" in page
    assert "paired" not in {file.stem for file in (world / "one" / "csv").iterdir()}


def test_runs_of_different_shapes_are_no_group(world, tmp_path):
    shutil.copytree(world / "runs" / "eit-0", tmp_path / "runs" / "mixed-0")
    out = tmp_path / "runs" / "mixed-1"
    deeper = [*TINY, "model.depth=3", f"data.root={world / 'data'}", f"out={out}"]
    train(load_recipe("cifar10", deeper))
    done = run_eit("analyze", "runs/mixed-*", "--data", world / "data", "--pictures", "0", cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("eit: ")]
    assert done.returncode == 2 and len(lines) == 1
    assert "runs/mixed-*: runs/mixed-0 and runs/mixed-1 differ in layers, heads or tokens" in lines[0]


def test_a_pattern_that_matches_nothing_gets_one_line(world):
    done = run_eit("analyze", "runs/none-*", "--data", "data", cwd=world)
    assert done.returncode == 2 and "matches runs/none-*" in done.stderr
    assert "Traceback" not in done.stderr


def test_initial_values_are_made_with_the_path_of_the_class_token_that_the_weights_have(world):
    """A recipe that is older than cls_conv does not say it; its weights do."""
    trained, initial = load_models([str(world / "runs" / "eit-0")])
    assert initial.model.blocks[0].attn.cls_conv == trained.model.blocks[0].attn.cls_conv
