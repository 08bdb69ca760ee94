import csv
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision

import eit
from eit.config import load_recipe, model_arguments
from eit.models.registry import FAMILIES, VARIANTS, published_results


def test_names():
    sizes = ("mini", "tiny", "base", "large")
    assert eit.list_models() == [f"{family}_{size}" for family in ("eit", "eit_plus") for size in sizes]
    assert set(eit.list_models()) <= set(timm.list_models("eit_*"))


def test_timm_creates_our_models():
    model = timm.create_model("eit_mini", num_classes=10, in_chans=1, drop_path_rate=0.1)
    assert isinstance(model, eit.EIT)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 10)
    assert model.blocks[-1].drop_path1.drop_prob == 0.1
    assert model.default_cfg["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert timm.data.resolve_data_config({}, model=model)["crop_pct"] == 0.875


@pytest.mark.parametrize(
    "statements",
    [
        pytest.param("import eit, timm", marks=pytest.mark.slow),
        pytest.param("import timm, eit", marks=pytest.mark.slow),
        pytest.param("from eit.models.eit import EIT; import timm", marks=pytest.mark.slow),
        pytest.param("import eit.training.trainer; import timm", marks=pytest.mark.slow),
        "import eit, importlib.util; importlib.util.find_spec('timm'); import timm",
    ],
)
def test_importing_eit_registers_with_timm_in_any_order(statements):
    code = f"{statements}; assert 'eit_mini' in timm.list_models(); timm.create_model('eit_mini', depth=1)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_eit_alone_imports_neither_torch_nor_timm():
    code = "import sys, eit; eit.__version__; assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_weights_are_pretended():
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("eit_mini", pretrained=True)


@pytest.mark.parametrize(
    ("family", "stem", "position", "cls_conv", "gated", "channels"),
    [
        (None, "ConvPoolStem", False, "identity", False, [50, 100, 150, 200, 250]),
        ("eit", "ConvPoolStem", False, "identity", False, [50, 100, 150, 200, 250]),
        ("eit_plus", "ConvPoolStem", False, "zero", False, [50, 100, 150, 200, 250]),
        ("lsra", "ConvPoolStem", False, "zero", False, [120] * 5),
        ("lite", "ConvPoolStem", True, "identity", True, [120] * 5),
        ("vit", "PatchStem", True, "identity", False, [250] * 5),
    ],
)
def test_families(family, stem, position, cls_conv, gated, channels):
    with torch.device("meta"):
        model = eit.create_model("eit_mini", family=family)
    assert type(model.patch_embed).__name__ == stem
    assert (model.pos_embed is not None) == position
    assert model.attn_channels == channels
    assert {block.attn.cls_conv for block in model.blocks} == {cls_conv}
    assert {hasattr(block.attn, "conv_in") for block in model.blocks} == {gated}


def test_presets_are_complete():
    """A preset that left a key out would take the published value, and what is saved would not say so."""
    assert len({tuple(preset) for preset in FAMILIES.values()}) == 1
    for family, preset in FAMILIES.items():
        assert model_arguments(preset | dict(family=family)) == preset | dict(
            family=family
        )  # recipes and cards know them


@pytest.mark.parametrize("size", ["mini", "tiny", "base", "large"])
def test_eit_plus_is_one_model_by_two_names(size):
    with torch.device("meta"):
        named, preset = eit.create_model(f"eit_plus_{size}"), eit.create_model(f"eit_{size}", family="eit_plus")
        twice = eit.create_model(f"eit_plus_{size}", family="eit_plus")
        published = eit.create_model(f"eit_{size}")
    assert str(named) == str(preset) == str(twice)
    assert {b.attn.cls_conv for m in (named, preset, twice) for b in m.blocks} == {"zero"}
    assert {b.attn.cls_conv for b in published.blocks} == {"identity"}
    assert eit.complexity(named) == eit.complexity(published)  # better, and free
    assert type(timm.create_model(f"eit_plus_{size}", depth=1)) is eit.EIT


def test_a_recipe_says_eit_plus_in_one_way():
    named, preset, both = (
        load_recipe("cifar10", words).model
        for words in (
            ["model.name=eit_plus_tiny"],
            ["model.name=eit_tiny", "model.family=eit_plus"],
            ["model.name=eit_plus_tiny", "model.family=eit_plus"],
        )
    )
    assert named == preset == both and (named.name, named.family) == ("eit_tiny", "eit_plus")
    for family in ("eit", "lsra"):
        with pytest.raises(eit.UserError) as error:
            load_recipe("cifar10", ["model.name=eit_plus_tiny", f"model.family={family}"])
        assert str(error.value).startswith(f"model.family={family}: model.name=eit_plus_tiny is of the family eit_plus")


def test_arguments_win_over_the_family():
    with torch.device("meta"):
        model = eit.create_model("eit_mini", family="vit", pos_embed="none", schedule="increasing")
    assert model.pos_embed is None
    assert model.attn_channels == [250, 200, 150, 100, 50]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("eit_mni", {}, "unknown model 'eit_mni'; did you mean 'eit_mini'?"),
        ("eit_plus_mni", {}, "unknown model 'eit_plus_mni'; did you mean 'eit_plus_mini'?"),
        ("eit_mini", dict(family="swin"), "unknown family 'swin'"),
        ("eit_plus_mini", dict(family="eit"), "eit_plus_mini: family=eit is not eit_plus"),
        ("eit_mini", dict(famly="lsra"), "eit_mini has no argument 'famly'; did you mean 'family'?"),
        ("eit_mini", dict(embed_dims=3), "eit_mini has no argument 'embed_dims'; did you mean 'embed_dim'?"),
        ("eit_mini", dict(pretrained=True), "weights of eit_mini are included: use eit.load(PATH)"),
        ("eit_mini", dict(embed_dim=251), "eit_mini: embed_dim=251 is not a multiple of num_heads=10"),
    ],
)
def test_mistakes_are_named(name, arguments, message):
    with pytest.raises(eit.UserError) as error:
        eit.create_model(name, **arguments)
    assert message in str(error.value)


def test_published_results_have_their_sources_and_agree_with_torchvision():
    """torchvision states the same figures of its weights in its own code."""
    rows = list(
        csv.DictReader(Path(eit.__file__).with_name("models").joinpath("published.csv").read_text().splitlines())
    )
    assert all(url.startswith("https://") for row in rows for url in row["source"].split())
    assert {row["pyramid"] for row in rows} == {"yes", "no"}
    checked = 0
    for row in rows:
        page = row["source"].rpartition("torchvision.models.")[2].removesuffix(".html")
        if "torchvision" not in row["source"]:
            continue
        meta = torchvision.models.get_model_weights(page).IMAGENET1K_V1.meta
        assert float(row["params_m"]) == pytest.approx(meta["num_params"] / 1e6, abs=0.01)
        assert float(row["gmacs"]) == pytest.approx(meta["_ops"], abs=0.01)
        assert float(row["top1"]) == meta["_metrics"]["ImageNet-1K"]["acc@1"]
        checked += 1
    assert checked == 6


def test_the_published_figures_of_eit_agree_with_the_models():
    points = {point.model: point for point in published_results() if point.family == "EIT"}
    assert [p.top1 for p in points.values()] == [70.0, 78.1, 80.6, 81.8]
    for name in VARIANTS:
        with torch.device("meta"):
            model = eit.create_model(name)
        cost, point = eit.complexity(model), points[f"EIT-{name[4:]}"]
        assert point.params_m == pytest.approx(cost.params / 1e6, abs=0.05)
        assert point.gmacs == pytest.approx(cost.macs / 1e9, abs=0.0006)
        assert not point.pyramid


def test_a_model_of_timm_by_its_name():
    assert eit.create_model("timm/resnet18", num_classes=3).fc.weight.shape == (3, 512)
    for name, more, message in (
        ("timm/resnet17", {}, "timm has no model 'resnet17'; did you mean"),
        ("timm/resnet18", dict(family="vit"), "family=vit is for this package's models"),
        ("timm/resnet18", dict(depth=3), "timm/resnet18: "),
        ("timm/hf-hub:someone/model", {}, "timm has no model"),
    ):
        with pytest.raises(eit.UserError, match=message):
            eit.create_model(name, **more)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(depth=True), "depth=True is not an integer"),
        (dict(depth=2.5), "depth=2.5 is not an integer"),
        (dict(num_heads="5"), "num_heads='5' is not an integer"),
        (dict(num_classes=10.0), "num_classes=10.0 is not an integer"),
        (dict(num_classes=True), "num_classes=True is not an integer"),
        (dict(drop_rate=float("nan")), "drop_rate=nan is not in 0..1"),
        (dict(drop_path_rate=2), "drop_path_rate=2 is not in 0..1"),
    ],
)
def test_arguments_of_another_type_are_one_line(arguments, message):
    with pytest.raises(eit.UserError, match=message):
        eit.create_model("eit_mini", **arguments)
