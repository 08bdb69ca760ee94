import subprocess
import sys

import pytest
import timm
import torch

import eit


def test_names():
    assert eit.list_models() == ["eit_mini", "eit_tiny", "eit_base", "eit_large"]
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
        "import eit, timm",
        "import timm, eit",
        "from eit.model import EIT; import timm",
        "import eit.train; import timm",
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
    ("family", "stem", "position", "channels"),
    [
        (None, "ConvPoolStem", False, [50, 100, 150, 200, 250]),
        ("eit", "ConvPoolStem", False, [50, 100, 150, 200, 250]),
        ("lsra", "ConvPoolStem", False, [120] * 5),
        ("vit", "PatchStem", True, [250] * 5),
    ],
)
def test_families(family, stem, position, channels):
    model = eit.create_model("eit_mini", family=family)
    assert type(model.patch_embed).__name__ == stem
    assert (model.pos_embed is not None) == position
    assert model.attn_channels == channels


def test_arguments_win_over_the_family():
    model = eit.create_model("eit_mini", family="vit", pos_embed="none", schedule="increasing")
    assert model.pos_embed is None
    assert model.attn_channels == [250, 200, 150, 100, 50]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("eit_mni", {}, "unknown model 'eit_mni'; did you mean 'eit_mini'?"),
        ("eit_mini", dict(family="swin"), "unknown family 'swin'"),
        ("eit_mini", dict(famly="lsra"), "eit_mini has no argument 'famly'; did you mean 'family'?"),
        ("eit_mini", dict(embed_dims=3), "eit_mini has no argument 'embed_dims'; did you mean 'embed_dim'?"),
        ("eit_mini", dict(pretrained=True), "no weights of eit_mini ship: use eit.load(PATH)"),
        ("eit_mini", dict(embed_dim=251), "eit_mini: embed_dim=251 is not a multiple of num_heads=10"),
    ],
)
def test_mistakes_are_named(name, arguments, message):
    with pytest.raises(eit.UserError) as error:
        eit.create_model(name, **arguments)
    assert message in str(error.value)
