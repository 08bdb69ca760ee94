import argparse
import json
import math
import os
import pickle

import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import eit
from eit.config import load_recipe
from eit.data.images import normalise, to_mode
from eit.training.run_folder import read_recipe
from eit.training.setup import build_model
from eit.weights.card import Card
from eit.weights.formats import save_weights
from tests.helpers import reference
from tests.helpers.commands import run_eit

SMALL = dict(img_size=16, kernel_size=3, stride=1, pool_size=4, embed_dim=16, depth=2, num_heads=2)


def card(**changes):
    values = dict(
        model="eit_mini",
        arguments={k: v for k, v in SMALL.items() if k != "img_size"},
        classes=["cat", "dog", "owl"],
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        size=16,
        resize=16,
        interpolation="bicubic",
    )
    return Card(**(values | changes))


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    model = eit.create_model("eit_mini", num_classes=3, **SMALL)
    save_weights(tmp_path / "w.safetensors", model.state_dict(), card())
    return model, tmp_path / "w.safetensors"


def official(tmp_path, name="eit_mini", **changes):
    """A checkpoint as the authors' code writes it, with everything that it holds beside the weights."""
    case = reference.case(name)
    content = dict(
        model=reference.published_state(case),
        optimizer=dict(state={0: dict(step=3, exp_avg=torch.ones(2))}, param_groups=[dict(lr=1e-3, params=[0])]),
        lr_scheduler=dict(base_values=[1e-3], last_epoch=3),
        epoch=299,
        model_ema=reference.published_state(case),
        scaler=dict(scale=65536.0),
        args=argparse.Namespace(model="eit_tiny", lr=1e-3, resume=""),
    )
    torch.save(content | changes, tmp_path / "official.pth")
    return case, tmp_path / "official.pth"


def test_weights_describe_themselves(weights):
    model, file = weights
    loaded = eit.load(file)
    assert not loaded.training
    assert loaded.card.classes == ["cat", "dog", "owl"]
    assert loaded.card.version == eit.__version__
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model.eval()(x))
    loaded(x).sum().backward()  # the parameters can be trained


def without_key(file, key):
    """The file, with a card that does not have the argument: as versions before it wrote it."""
    with safetensors.safe_open(file, framework="pt") as f:
        metadata, state = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    header = json.loads(metadata["eit"])
    del header["arguments"][key]
    safetensors.torch.save_file(state, file, metadata | dict(eit=json.dumps(header)))
    return file


@pytest.mark.parametrize("arguments", [{}, dict(family="eit"), dict(family="lsra"), dict(family="vit")])
def test_a_file_that_is_older_than_cls_conv_reads_as_published(tmp_path, arguments):
    made = card(arguments={k: v for k, v in SMALL.items() if k != "img_size"} | dict(patch_size=4) | arguments)
    torch.manual_seed(0)
    model = eit.create_model("eit_mini", num_classes=3, **(SMALL | dict(patch_size=4, cls_conv="identity") | arguments))
    with torch.no_grad():
        for p in model.parameters():  # initial values are too even to tell paths apart
            p.add_(0.2 * torch.randn_like(p))
    save_weights(tmp_path / "old.safetensors", model.state_dict(), made)
    loaded = eit.load(without_key(tmp_path / "old.safetensors", "cls_conv"))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model.eval()(x))
    assert eit.load_weights(made.create_model(), tmp_path / "old.safetensors")  # other code may still be asked for
    save_weights(tmp_path / "new.safetensors", loaded.state_dict(), loaded.card)  # and now it is said
    with safetensors.safe_open(tmp_path / "new.safetensors", framework="pt") as f:
        assert json.loads(f.metadata()["eit"])["arguments"]["cls_conv"] == "identity"
    assert torch.equal(eit.load(tmp_path / "new.safetensors")(x), loaded(x))


@pytest.mark.parametrize("family", ["eit", "lsra", "vit"])
def test_the_recipe_of_a_run_that_is_older_than_cls_conv_reads_as_published(tmp_path, family):
    new = load_recipe("cifar10", [f"model.family={family}"])
    whole = new.to_yaml()
    old = "".join(
        line for line in whole.splitlines(keepends=True) if "cls_conv" not in line and "conv_branch" not in line
    )
    made = {}
    for name, text in dict(old=old, new=whole).items():
        (tmp_path / "recipe.yaml").write_text(text)
        made[name] = build_model(read_recipe(tmp_path), 10).blocks[0].attn.cls_conv
    assert made == dict(old="identity", new="zero" if family == "lsra" else "identity")


@pytest.mark.parametrize("cls_conv", ["identity", "zero", "mean"])
def test_a_recipe_says_what_the_class_token_has(cls_conv):
    recipe = load_recipe("cifar10", [f"model.cls_conv={cls_conv}", "model.conv_branch=gated"])
    mixer = build_model(recipe, 10).blocks[0].attn
    assert mixer.cls_conv == cls_conv and hasattr(mixer, "conv_in")
    with pytest.raises(eit.UserError, match="model.cls_conv=none: should be 'identity', 'zero' or 'mean'"):
        load_recipe("cifar10", ["model.cls_conv=none"])


@pytest.mark.parametrize("cls_conv", ["identity", "zero", "mean"])
@pytest.mark.parametrize("family", ["eit", "eit_plus", "lsra", "lite"])
def test_a_file_says_what_the_class_token_has(tmp_path, family, cls_conv):
    own = {k: v for k, v in SMALL.items() if k != "img_size"} | dict(family=family, cls_conv=cls_conv)
    save_weights(tmp_path / "w.safetensors", card(arguments=own).create_model().state_dict(), card(arguments=own))
    with safetensors.safe_open(tmp_path / "w.safetensors", framework="pt") as f:
        assert json.loads(f.metadata()["eit"])["arguments"]["cls_conv"] == cls_conv
    assert {block.attn.cls_conv for block in eit.load(tmp_path / "w.safetensors").blocks} == {cls_conv}


def test_a_card_for_eit_plus_is_one_of_its_family(tmp_path):
    own = {k: v for k, v in SMALL.items() if k != "img_size"}
    named, preset = card(model="eit_plus_mini", arguments=own), card(arguments=own | dict(family="eit_plus"))
    assert named == preset and named.model == "eit_mini"
    save_weights(tmp_path / "w.safetensors", named.create_model().state_dict(), named)
    loaded = eit.load(tmp_path / "w.safetensors")
    assert {block.attn.cls_conv for block in loaded.blocks} == {"zero"} and loaded.card == preset
    with pytest.raises(eit.UserError, match="family=lsra is not eit_plus"):
        card(model="eit_plus_mini", arguments=own | dict(family="lsra")).create_model()


def test_a_preset_that_changes_later_does_not_change_a_file(tmp_path, monkeypatch):
    own = {k: v for k, v in SMALL.items() if k != "img_size"} | dict(family="eit_plus")
    save_weights(tmp_path / "w.safetensors", card(arguments=own).create_model().state_dict(), card(arguments=own))
    assert eit.load(tmp_path / "w.safetensors").card.arguments == own
    later = eit.models.registry.FAMILIES["eit_plus"] | dict(cls_conv="mean", schedule="vit")
    monkeypatch.setitem(eit.models.registry.FAMILIES, "eit_plus", later)
    loaded = eit.load(tmp_path / "w.safetensors")
    assert loaded.card.arguments == own | dict(cls_conv="zero", schedule="eit")
    assert {block.attn.cls_conv for block in loaded.blocks} == {"zero"} and loaded.attn_channels == [8, 16]


@pytest.mark.parametrize("size, resize", [(16, 16), (28, 50), (224, 256)])
@pytest.mark.parametrize("channels", [1, 3])
def test_timms_own_transform_shows_a_loaded_model_what_our_view_does(tmp_path, size, resize, channels):
    arguments = {k: v for k, v in SMALL.items() if k != "img_size"} | dict(in_chans=channels)
    mean, std = (0.2, 0.3, 0.4)[:channels], (0.5, 0.6, 0.7)[:channels]
    look = card(arguments=arguments, mean=mean, std=std, size=size, resize=resize, interpolation="bilinear")
    save_weights(tmp_path / "other.safetensors", look.create_model().state_dict(), look)
    model = eit.load(tmp_path / "other.safetensors")
    assert model.pretrained_cfg is model.default_cfg and model.pretrained_cfg["num_classes"] == 3
    image = to_mode(Image.effect_noise((90, 61), 60), channels)
    own = normalise(look.view.pixels(image)[None], mean, std)[0]
    seen = create_transform(**resolve_data_config({}, model=model))(image)
    torch.testing.assert_close(seen, own)


def test_timms_resize_is_ours_at_any_size():
    for size in range(1, 80):
        for resize in range(size, 160):
            crop = card(size=size, resize=resize).timm_cfg["crop_pct"]
            assert math.floor(size / crop) == resize and crop <= 1


def test_a_run_folder_stands_for_its_best_weights(weights, tmp_path):
    weights[1].rename(tmp_path / "final.safetensors")
    assert eit.load(tmp_path).card.size == 16
    torch.manual_seed(1)
    save_weights(tmp_path / "best.safetensors", weights[0].state_dict(), card(classes=["a", "b", "c"]))
    assert eit.load(tmp_path).card.classes == ["a", "b", "c"]


def test_published_weights_are_recognised_by_their_shapes_and_nothing_else_is_believed(tmp_path):
    case, file = official(tmp_path)  # `args` in it names another model
    model = eit.load(file)
    assert model.card.model == "eit_mini"
    assert len(model.card.classes) == 1000 and "tench" in model.card.classes[0]
    assert (model.card.size, model.card.resize) == (224, 256)
    with torch.no_grad():
        logits = model(reference.images(case))
    torch.testing.assert_close(
        logits[:, :8].double(), torch.tensor(case["logits_first8"], dtype=torch.float64), atol=2e-5, rtol=0
    )


def test_published_weights_convert_and_predict(tmp_path, folder):
    _, file = official(tmp_path)
    done = run_eit("convert", file, tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert "eit_mini, 1000 classes, 3,512,750 parameters" in done.stdout
    assert torch.equal(eit.load(tmp_path / "out.safetensors").head.weight, eit.load(file).head.weight)
    image = folder / "val" / "digit0" / "000.png"
    images = [
        json.loads(run_eit("predict", f, folder / "val" / "digit0" / "000.png", "--json").stdout)
        for f in (file, tmp_path / "out.safetensors")
    ]
    assert images[0] == images[1]
    assert len(images[0]["labels"]) == 5
    assert image.parent.exists()


def test_other_published_weights_are_named_by_the_user(tmp_path):
    _, file = official(tmp_path, "eit_small_data")
    done = run_eit("convert", file, tmp_path / "out.safetensors")
    assert done.returncode == 2
    assert "does not say which model it is" in done.stderr and "--model" in done.stderr
    named = ["--model", "eit_mini", "--size", "32", "kernel_size=3", "stride=1", "pool_size=4"]
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    done = run_eit("convert", file, tmp_path / "out.safetensors", *named, "--classes", tmp_path / "names.txt")
    assert done.returncode == 0, done.stderr
    assert eit.load(tmp_path / "out.safetensors").card.classes == list("abcdefghij")
    assert eit.load(tmp_path / "out.safetensors").card.size == 32


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_is_refused_by_name_and_not_executed(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.pth"
    if zipped:
        _, file = official(tmp_path, extra=Malicious())
    else:
        file.write_bytes(pickle.dumps(dict(model=Malicious())))
    with pytest.raises(eit.UserError, match=rf"{file.name} is refused: .*could run code") as error:
        eit.load(file)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()
    torch.load(file, weights_only=False) if zipped else pickle.loads(file.read_bytes())
    assert (tmp_path / "pwned").exists()  # the file was a live one


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_damaged_file_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(eit.UserError, match=name) as error:
        eit.load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_flipped_bits_are_noticed(weights):
    _, file = weights
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(eit.UserError, match="damaged: its weights do not match their checksum"):
        eit.load(file)


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    (tmp_path / "best_checkpoint.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(eit.UserError, match="is a Git LFS pointer.*git lfs pull"):
        eit.load(tmp_path / "best_checkpoint.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(eit.UserError, match=r"no weights at .*gone\.pth"):
        eit.load(tmp_path / "gone.pth")
    with pytest.raises(eit.UserError, match="is not a run folder"):
        eit.load(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(eit.UserError, match=r"neither best\.safetensors nor final\.safetensors"):
        eit.load(tmp_path)


def test_the_model_of_a_newer_version_is_named(tmp_path, weights):
    save_weights(tmp_path / "n.safetensors", weights[0].state_dict(), card(model="eit_huge", version="9.9"))
    with pytest.raises(eit.UserError, match=r"does not know; it was made by 9\.9"):
        eit.load(tmp_path / "n.safetensors")


def test_state_dicts_of_timm_ddp_and_compile_load(weights):
    model, _ = weights
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        other = eit.create_model("eit_mini", num_classes=3, **SMALL)
        assert eit.load_weights(other, state) is other
        assert torch.equal(other.head.weight, model.head.weight)


def test_loading_is_strict_and_says_what_differs(weights):
    model, file = weights
    deeper = eit.create_model("eit_mini", num_classes=3, **(SMALL | dict(depth=3)))
    with pytest.raises(eit.UserError, match=r"does not fit the model: .*blocks.0.attn.qkv.weight is .* more"):
        eit.load_weights(deeper, file)
    state = model.state_dict()
    del state["norm.bias"]
    with pytest.raises(eit.UserError, match="norm.bias is missing"):
        eit.load_weights(model, state)
    with pytest.raises(eit.UserError, match="extra is unknown"):
        eit.load_weights(model, model.state_dict() | {"extra": torch.ones(1)})


def test_a_head_of_another_size_is_refused_unless_reset(weights):
    model, file = weights
    other = eit.create_model("eit_mini", num_classes=7, **SMALL)
    head = other.head.weight.clone()
    with pytest.raises(eit.UserError, match="a head for 3 classes, 7 are needed; model.reset_head=true"):
        eit.load_weights(other, file)
    eit.load_weights(other, file, reset_head=True)
    assert torch.equal(other.head.weight, head)
    assert torch.equal(other.norm.weight, model.norm.weight)


def test_plain_safetensors_of_a_published_model_load(tmp_path):
    case = reference.case("eit_tiny")
    safetensors.torch.save_file(reference.published_state(case), tmp_path / "plain.safetensors")
    assert eit.load(tmp_path / "plain.safetensors").card.model == "eit_tiny"


@pytest.mark.parametrize(
    "state",
    [
        {1: torch.ones(1)},
        {"head.weight": torch.tensor(1.0)},
        {"head.weight": torch.ones(3, 4, dtype=torch.int64)},
        {"head.weight": torch.ones(3, 4), "pre_logits.fc.weight": torch.tensor(1.0)},
        [torch.ones(1)],
    ],
)
def test_state_dicts_that_are_none_are_one_line(tmp_path, state):
    torch.save(dict(model=state), tmp_path / "a.pth")
    with pytest.raises(eit.UserError, match=r"a\.pth") as error:
        eit.load(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(arguments=dict(num_classes=3)),
        dict(arguments=dict(depth="deep")),
        dict(arguments=dict(depth=10**9)),
        dict(arguments=dict(global_pool="zzz")),
        dict(model="eit_huge"),
        dict(interpolation="foo"),
        dict(size=-3),
        dict(resize=10**6),
        dict(mean=[0.5]),
        dict(classes=["one"]),
        dict(extra=1),
    ],
)
def test_a_lying_description_is_one_line(tmp_path, weights, changes):
    with safetensors.safe_open(weights[1], framework="pt") as f:
        header = json.loads(f.metadata()["eit"]) | changes
    safetensors.torch.save_file(weights[0].state_dict(), tmp_path / "lie.safetensors", {"eit": json.dumps(header)})
    with pytest.raises(eit.UserError, match=r"lie\.safetensors") as error:
        eit.load(tmp_path / "lie.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", [None, 3, [("head.weight", 1)], torch.nn.Linear(2, 2), b"digits"])
def test_a_source_of_another_type_is_refused(source):
    with pytest.raises(eit.UserError, match=f"load_weights takes a file, .* not {type(source).__name__}"):
        eit.load_weights(eit.create_model("eit_mini", num_classes=3, **SMALL), source)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.numpy(),
        lambda weight: None,
        lambda weight: weight.to("meta"),
        lambda weight: weight.to_sparse(),
        lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    ],
    ids=["numpy", "none", "meta", "sparse", "quantised"],
)
def test_a_state_dict_with_other_values_is_refused_and_nothing_is_loaded(change):
    model = eit.create_model("eit_mini", num_classes=3, **SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    with pytest.raises(eit.UserError, match="head.weight"):
        eit.load_weights(model, state | {"head.weight": change(state["head.weight"])})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
