"""Starting from other weights: what is taken over, what learns, and at which rate."""

import shutil
from pathlib import Path

import pytest
import timm
import torch

import eit
from eit.config import load_recipe
from eit.data.datasets import open_data
from eit.training import trainer as train_module
from eit.training.setup import build_model, check_single_images, choose_trainable, make_view, resolve_architecture
from eit.training.trainer import train
from eit.weights.card import Card
from eit.weights.formats import save_weights
from eit.weights.load import read_card
from tests.helpers.training import TINY, recipe, same, train_until_killed, weights


def test_fine_tuning_starts_from_a_checkpoint(folder):
    first = recipe(folder)
    train(first)
    start = f"model.pretrained={first.run_folder()}"
    model = build_model(recipe(folder, start), 3)
    assert same(model.state_dict(), weights(first.run_folder(), "best"))
    shutil.rmtree(folder / "train" / "digit2")
    shutil.rmtree(folder / "val" / "digit2")
    with pytest.raises(eit.UserError, match="a head for 3 classes, 2 are needed; model.reset_head=true"):
        train(recipe(folder, start, f"out={folder.parent / 'tuned'}"))
    train(recipe(folder, start, "model.reset_head=true", f"out={folder.parent / 'tuned'}"))


def test_a_reset_head_is_new_for_an_equal_number_of_classes_too(folder):
    first = recipe(folder)
    train(first)
    trained = weights(first.run_folder(), "best")
    model = build_model(recipe(folder, f"model.pretrained={first.run_folder()}", "model.reset_head=true"), 3)
    assert torch.equal(model.norm.weight, trained["norm.weight"])
    assert not torch.equal(model.head.weight, trained["head.weight"])


def test_the_architecture_comes_with_the_weights(folder, capsys):
    """A LSRA of other sizes is continued by a recipe that says nothing of it; dropout stays the recipe's."""
    first = recipe(folder, "model.family=lsra", "model.embed_dim=24", "model.drop_path_rate=0.3", "model.in_chans=1")
    train(first)
    second = recipe(folder, f"model.pretrained={first.run_folder()}", f"out={folder.parent / 'tuned'}")
    resolved = resolve_architecture(second).model
    assert (resolved.family, resolved.embed_dim, resolved.in_chans, resolved.drop_path_rate) == ("lsra", 24, 1, 0.2)
    said = capsys.readouterr().err
    assert "the model is that of" in said and "embed_dim: 16 -> 24" in said and "family: eit -> lsra" in said
    train(second)
    card = read_card(folder.parent / "tuned")
    assert card.arguments["embed_dim"] == 24 and card.recipe["model"]["family"] == "lsra"
    train(second)  # finished: the resolved recipe is the one that the folder holds


def test_a_learned_table_of_positions_is_interpolated_to_another_resolution(folder):
    """Fine-tuning at another size starts from what the weights themselves give at that size."""
    first = recipe(folder, "model.family=vit", "model.patch_size=4")
    train(first)
    larger = resolve_architecture(recipe(folder, f"model.pretrained={first.run_folder()}", "data.image_size=24"))
    model = build_model(larger, 3).eval()
    assert model.pos_embed.shape == (1, 1 + 6 * 6, 16)
    x = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(model(x), eit.load(first.run_folder())(x))
    train(larger.model_copy(update=dict(out=str(folder.parent / "larger"))))
    assert eit.load(folder.parent / "larger").card.size == 24


def test_a_table_of_timm_is_interpolated_too():
    small, large = (timm.create_model("vit_tiny_patch16_224", img_size=s, depth=1) for s in (32, 64))
    eit.load_weights(large, small.state_dict())
    assert torch.equal(large.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(large.pos_embed[:, :1], small.pos_embed[:, :1])


# -- Models of timm


def test_a_model_of_timm_is_trained_continued_and_loaded(folder, monkeypatch, capsys):
    start = [f"data.root={folder}", *TINY[6:], "model.name=timm/test_resnet", "model.in_chans=1"]
    r = load_recipe("cifar10", [*start, f"out={folder.parent / 'run'}", "train.max_steps=5"])
    train(r)
    assert "timm/test_resnet does not have these arguments, and they are left out: " in capsys.readouterr().err
    model = eit.load(r.run_folder())
    assert type(model).__name__ == "ResNet" and model.card.model == "timm/test_resnet" and model.card.in_chans == 1
    again = [
        *start[:-2],
        f"model.pretrained={r.run_folder()}",
        "model.reset_head=true",
        f"out={folder.parent / 'again'}",
    ]
    resolved = resolve_architecture(load_recipe("cifar10", again))
    assert (resolved.model.name, resolved.model.in_chans, resolved.model.embed_dim) == ("timm/test_resnet", 1, None)
    tuned = build_model(resolved, 7)
    assert torch.equal(tuned.conv1[0].weight, model.conv1[0].weight) and tuned.fc.weight.shape == (7, 96)


def test_weights_of_timm_are_asked_for(monkeypatch, folder):
    asked = []
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: asked.append(k.pop("pretrained")) or original(*a, **k))
    r = load_recipe(
        "imagenet_mini", [f"data.root={folder}", "model.name=timm/vit_tiny_patch16_224", "data.image_size=32"]
    )
    build_model(resolve_architecture(r), 3)
    model = build_model(
        resolve_architecture(r.model_copy(update=dict(model=r.model.model_copy(update=dict(pretrained=True))))), 3
    )
    assert asked == [False, True] and model.pos_embed.shape[1] == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.pretrained=true"], "no weights of eit_mini can be downloaded: give a file, model.pretrained=PATH"),
        (["model.name=timm/resnet17"], "timm has no model 'resnet17'"),
        (["model.name=resnet18"], "unknown model 'resnet18'"),
        (["optim.freeze=[block.0]"], r"optim.freeze=block.0: the model has no such part \(cls_token, patch_embed"),
        (["optim.trainable=head", "optim.freeze=[head]"], "leaves nothing to learn"),
        (["loss.teacher=gone"], "no weights at gone"),
        (["loss.teacher=timm/resnet18"], "loss.teacher=timm/resnet18 knows 1000 classes, the data have 3"),
        (["model.name=timm/resnet18", "optim.trainable=attention"], "timm/resnet18 has no attention layers"),
        (["loss.class_weights={digit9: 2}"], "loss.class_weights names 'digit9'"),
        (["loss.class_weights={digit0: 0, digit1: 0, digit2: 0}"], "are all 0: nothing would be learned"),
        (["loss.teacher=digits", "loss.teacher_size=1"], "does not know the classes digit0"),
    ],
)
def test_a_wrong_start_is_one_line(folder, overrides, message):
    with pytest.raises(eit.UserError, match=message) as error:
        train(recipe(folder, *overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["swin_s3_tiny_224", "beit_base_patch16_224", "levit_128s", "legacy_seresnet18"])
def test_models_of_timm_with_buffers_and_names_of_their_own_load_again(name, tmp_path):
    small = dict(
        swin_s3_tiny_224=dict(embed_dim=24),
        beit_base_patch16_224=dict(embed_dim=96, depth=2, num_heads=3),
    ).get(name, {})
    model = eit.create_model(f"timm/{name}", num_classes=2, **small).eval()
    card = Card(
        model=f"timm/{name}", arguments=small, classes=["a", "b"], mean=(0.5,) * 3, std=(0.5,) * 3, size=224,
        resize=224, interpolation="bicubic",
    )  # fmt: skip
    save_weights(tmp_path / "w.safetensors", model.state_dict(), card)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(eit.load(tmp_path / "w.safetensors")(x), model(x))


def test_timms_own_rules_fit_other_tables_of_positions():
    """BEiT's relative positions, at another resolution."""
    small, large = (timm.create_model("beit_base_patch16_224", img_size=s, depth=1) for s in (64, 96))
    eit.load_weights(large, small.state_dict())
    assert torch.equal(large.blocks[0].mlp.fc1.weight, small.blocks[0].mlp.fc1.weight)


def test_a_run_that_has_begun_needs_its_first_weights_no_more(folder, monkeypatch):
    first = recipe(folder, "model.family=lsra")
    train(first)
    whole, broken = (
        recipe(folder, f"model.pretrained={first.run_folder()}", f"out={folder.parent / name}") for name in ("w", "b")
    )
    train(whole)
    train_until_killed(broken, 5, monkeypatch)
    shutil.rmtree(first.run_folder())
    train(broken)
    assert same(weights(folder.parent / "w"), weights(folder.parent / "b"))
    train(broken)  # finished
    with pytest.raises(eit.UserError, match="drop_path_rate: 0.2 -> 0.3"):
        train(recipe(folder, f"model.pretrained={first.run_folder()}", f"out={broken.out}", "model.drop_path_rate=0.3"))


# -- What learns


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_learns():
    model = eit.create_model("eit_mini", depth=2, pos_embed="learned", num_classes=3)
    every = {name for name, _ in model.named_parameters()}

    def chosen(*overrides):
        choose_trainable(load_recipe("digits", overrides), model)
        return learning(model)

    assert chosen() == every
    assert chosen("optim.trainable=head") == {"head.weight", "head.bias"}
    attention = chosen("optim.trainable=attention")
    assert attention == {"pos_embed", "head.weight", "head.bias"} | {
        f"blocks.{i}.attn.{part}" for i in (0, 1) for part in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    }
    gated = eit.create_model("eit_mini", family="lite", depth=1, embed_dim=20)  # whose branch is no attention
    choose_trainable(load_recipe("digits", ["optim.trainable=attention"]), gated)
    assert "blocks.0.attn.qkv.weight" in learning(gated) and not any(".conv" in name for name in learning(gated))
    frozen = every - chosen("optim.freeze=[patch_embed, blocks.0]")
    assert frozen == {n for n in every if n.startswith(("patch_embed.", "blocks.0."))}
    deep = eit.create_model("eit_mini", depth=11, embed_dim=10)
    choose_trainable(load_recipe("digits", ["optim.freeze=[blocks.1]"]), deep)
    assert "blocks.10.norm1.weight" in learning(deep)


@pytest.mark.parametrize("overrides", [["optim.trainable=attention"], ["optim.freeze=[patch_embed]"]])
def test_what_is_frozen_keeps_its_values(folder, overrides):
    r = recipe(folder, *overrides, "train.ema_decay=0.9")
    before = build_model(r, 3)
    choose_trainable(r, before)
    learns = learning(before)
    train(r)
    for name, tensor in weights(r.run_folder()).items():
        assert torch.equal(tensor, before.state_dict()[name]) != (name in learns), name


def test_the_statistics_of_frozen_batch_norms_stay(folder):
    start = [f"data.root={folder}", *TINY[6:], "model.name=timm/test_resnet", f"out={folder.parent / 'run'}"]
    r = resolve_architecture(load_recipe("cifar10", [*start, "optim.trainable=head", "train.max_steps=3"]))
    before = build_model(r, 3).state_dict()
    train(r)
    after = weights(r.run_folder())
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["fc.weight", "fc.bias"]


def test_class_weights_and_binary_cross_entropy_train(folder):
    for i in range(9):
        (folder / "train" / "digit2" / f"{i:03d}.png").unlink()
    r = recipe(folder, "loss.class_weights=balanced", "loss.name=bce")
    assert train(r)["epochs"] == 2


# -- A teacher


@torch.no_grad()
def agreement(a, b, images):
    view = a.card.view
    x = torch.stack([view.pixels(images.read(i, 3)) for i in range(len(images))]).float() / 127.5 - 1
    return (a(x).argmax(1) == b(x).argmax(1)).float().mean().item()


@pytest.mark.slow
def test_a_distilled_student_agrees_with_its_teacher_more_often(tmp_path):
    """On a fifth of the digits, alone and with a teacher that was trained on most of them; as results/distillation."""
    own_run = Path(__file__).parents[2] / "results" / "digits" / "seed-0"
    few = ["data.val_fraction=0.8", "data.batch_size=16", "augment.smoothing=0"]
    teacher = [f"loss.teacher={own_run}", "loss.alpha=1", "loss.tau=4"]
    for name, more in (("alone", []), ("taught", teacher)):
        r = load_recipe("digits", [*few, *more, f"out={tmp_path / name}"])
        train(r)
    own, held_out = eit.load(own_run), open_data(r.data)[1]
    alone, taught = (
        agreement(eit.load(tmp_path / name / "final.safetensors"), own, held_out) for name in ("alone", "taught")
    )
    assert taught > alone + 0.01


def test_a_teacher_of_timm_teaches_in_a_continued_run_to_the_same_weights(folder, tmp_path, monkeypatch):
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "teacher.pth")
    teacher = [
        "loss.teacher=timm/test_resnet",
        f"loss.teacher_weights={tmp_path / 'teacher.pth'}",
        "loss.teacher_size=32",
    ]
    more = [*teacher, "train.save_every=1", "loss.distillation=hard"]
    whole, broken, alone = (recipe(folder, *m, f"out={tmp_path / n}") for n, m in (("w", more), ("b", more), ("a", [])))
    train(whole)
    train_until_killed(broken, 5, monkeypatch)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "other.pth")
    teacher_before = (tmp_path / "teacher.pth").read_bytes()
    (tmp_path / "teacher.pth").write_bytes((tmp_path / "other.pth").read_bytes())
    with pytest.raises(eit.UserError, match="another loss.teacher: "):
        train(broken)
    (tmp_path / "teacher.pth").write_bytes(teacher_before)
    train(broken)
    train(alone)
    assert same(weights(tmp_path / "w"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "w"), weights(tmp_path / "a"))


# -- Memory


def test_a_real_lack_of_memory_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(train_module, "make_criterion", lambda *_: lambda *_: torch.empty(2**50))
    with pytest.raises(
        eit.UserError, match="out of memory with data.batch_size=8 at data.image_size=16: set data.batch"
    ):
        train(recipe(folder))


def single_images(folder, *words):
    """The recipe and model of batches of one image."""
    off = ["augment.mixup=0", "augment.cutmix=0", "data.batch_size=1", "data.image_size=32"]
    r = resolve_architecture(recipe(folder, *off, *words))
    model = build_model(r, 3)
    choose_trainable(r, model)
    return r, model


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "efficientnet_b0"])
def test_a_batch_of_one_image_is_one_line_if_batch_norms_cannot_learn_from_it(folder, name):
    r, model = single_images(folder, f"model.name=timm/{name}")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(eit.UserError, match=f"data.batch_size=1: timm/{name} has batch norms, .*set data.batch_size=2"):
        check_single_images(r, model, make_view(r))
    assert same(before, model.state_dict())


@pytest.mark.parametrize(
    "words",
    [
        ["model.name=timm/resnet10t", "data.image_size=64"],  # four values per channel
        ["model.name=timm/resnet10t", "optim.trainable=head"],  # frozen norms
        ["model.name=timm/resnet10t", "data.batch_size=2"],
        ["model.name=timm/vit_tiny_patch16_224"],
        [],
    ],
)
def test_a_batch_of_one_image_is_taken_if_the_model_can(folder, words):
    r, model = single_images(folder, *words)
    state = torch.get_rng_state()
    check_single_images(r, model, make_view(r))
    assert torch.equal(torch.get_rng_state(), state)
