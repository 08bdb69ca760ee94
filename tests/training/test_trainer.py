"""The training loop: determinism, continuation, what is learnt, and what ends a run."""

import math
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import eit
from eit.config import load_recipe
from eit.data import datasets as data_module
from eit.data.datasets import open_data
from eit.data.order import SampleOrder
from eit.data.workers import LoaderStalled, StopRequested
from eit.randomness import Stream
from eit.training import loss as loss_module
from eit.training import trainer as train_module
from eit.training.checkpoint import load_checkpoint, newest_checkpoint, saved_steps
from eit.training.trainer import Stopped, train
from eit.weights.formats import read_safetensors
from tests.helpers.training import Killed, log, recipe, same, train_until_killed, weights

# -- Determinism and continuation


def test_the_same_seed_gives_the_same_weights_with_any_workers(folder):
    runs = []
    for i, more in enumerate((["data.workers=0"], ["data.workers=2"], ["seed=1"])):
        r = recipe(
            folder,
            "data.cache=false",
            "augment.pad_crop=0",
            "augment.crop_scale=[0.5,1]",
            f"out={folder.parent / str(i)}",
            *more,
        )
        train(r)
        runs.append(weights(r.run_folder()))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


FULL = ["train.ema_decay=0.9", "train.accumulate=2", "data.batch_size=4", "optim.clip_grad=1", "train.epochs=3"]


@pytest.mark.parametrize("at", [1, 4, 6, 11])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_died_continues_to_the_same_weights_and_log(folder, monkeypatch, at, precision):
    options = [*FULL, f"train.precision={precision}", "train.save_every=2"]
    whole = recipe(folder, *options, f"out={folder.parent / 'whole'}")
    train(whole)
    broken = recipe(folder, *options, f"out={folder.parent / 'broken'}")
    train_until_killed(broken, at, monkeypatch)
    train(broken)
    a, b = whole.run_folder(), broken.run_folder()
    for name in ("final", "best"):
        assert same(weights(a, name), weights(b, name))
    for name in ("model", "ema"):
        files = [read_safetensors(r / "checkpoints" / "step-12" / f"{name}.safetensors")[0] for r in (a, b)]
        assert same(*files)
    lines = [[{k: v for k, v in line.items() if k != "images_per_s"} for line in log(r)] for r in (a, b)]
    assert lines[0] == lines[1]


def test_what_was_logged_after_the_checkpoint_is_logged_once(folder, monkeypatch):
    """The line of an epoch follows its checkpoint; a torn one is left out."""
    r = recipe(folder, "train.epochs=3")
    original = train_module.write_checkpoint

    def write_checkpoint(run, step, *rest):
        if step == 8:
            raise Killed
        return original(run, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "write_checkpoint", write_checkpoint)
        with pytest.raises(Killed):
            train(r)
    assert [line["step"] for line in log(r.run_folder())] == [4]
    with open(r.run_folder() / "log.jsonl", "a") as f:
        f.write('{"epoch": 2, "st')
    train(r)
    assert [line["step"] for line in log(r.run_folder())] == [4, 8, 12]


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(folder, monkeypatch, capsys):
    r = recipe(folder, "train.save_every=1")
    train_until_killed(r, 3, monkeypatch)
    (r.run_folder() / "checkpoints" / "step-3" / "state.pt").write_bytes(b"")
    train(r)
    err = capsys.readouterr().err
    assert "step-3 is damaged: state.pt does not match its checksum" in err
    assert "from step 2" in err


def test_a_run_is_not_continued_on_other_data(folder, monkeypatch):
    r = recipe(folder)
    train_until_killed(r, 5, monkeypatch)
    (folder / "train" / "digit0" / "000.png").rename(folder / "train" / "digit1" / "new.png")
    with pytest.raises(eit.UserError, match="was trained with another data"):
        train(r)


# -- What is learnt


NARROW_DIGITS = ["model.embed_dim=32", "model.depth=2", "model.num_heads=4", "train.epochs=12", "train.warmup_epochs=1"]


def test_shuffled_labels_teach_nothing(tmp_path, monkeypatch):
    """On true labels the same recipe learns, see below; on shuffled ones it must stay near chance, or labels leak."""

    def shuffled(config):
        train_images, val_images = data_module.open_data(config)
        order = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0)).tolist()
        train_images.labels = [train_images.labels[i] for i in order]
        return train_images, val_images

    monkeypatch.setattr(train_module, "open_data", shuffled)
    summary = train(load_recipe("digits", [f"out={tmp_path}", *NARROW_DIGITS]))
    assert summary["last_top1"] < 20


def test_true_labels_do(tmp_path):
    summary = train(load_recipe("digits", [f"out={tmp_path}", *NARROW_DIGITS]))
    assert summary["last_top1"] > 50


# -- Parts


def test_accumulated_micro_batches_make_the_same_step_as_one_batch(folder):
    plain = [
        "augment.mixup=0",
        "augment.cutmix=0",
        *(f"model.{k}_rate=0" for k in ("pos_drop", "proj_drop", "attn_drop", "drop_path")),
    ]
    ends = []
    for batch, accumulate in ((8, 1), (2, 4)):
        r = recipe(
            folder,
            *plain,
            f"data.batch_size={batch}",
            f"train.accumulate={accumulate}",
            f"out={folder.parent / str(batch)}",
        )
        train(r)
        ends.append((weights(r.run_folder()), log(r.run_folder())[-1]["train_loss"]))
    for name, tensor in ends[0][0].items():
        torch.testing.assert_close(tensor, ends[1][0][name], atol=2e-4, rtol=0)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=bf16"],
        ["train.precision=fp16"],
        ["model.in_chans=1"],
        ["model.family=vit", "model.patch_size=4"],
        ["model.family=lsra"],
        ["optim.name=lamb", "optim.clip_grad=1"],
    ],
    ids=" ".join,
)
def test_variants_train(folder, overrides):
    r = recipe(folder, *overrides)
    assert train(r)["epochs"] == 2
    assert eit.load(r.run_folder()).card.in_chans == (1 if "model.in_chans=1" in overrides else 3)


@pytest.mark.slow
def test_a_compiled_run_trains(folder):
    assert train(recipe(folder, "train.compile=true"))["epochs"] == 2


def test_the_imagenet_pipeline_runs(folder):
    """RandAugment, random resized crops at 224, erasing, mixup, cutmix, repeated augmentation, EMA; small and short."""
    small = ["data.batch_size=6", "data.workers=2", "model.depth=1", "model.embed_dim=20", "train.max_steps=3"]
    r = load_recipe("imagenet_mini", [f"data.root={folder}", f"out={folder.parent / 'run'}", *small])
    summary = train(r)
    assert summary["epochs"] == 1 and summary["last_ema_top1"] is not None
    assert eit.load(r.run_folder()).card.resize == 256


def test_max_steps_ends_a_run_early_on_the_same_path(folder):
    whole = recipe(folder, "train.save_every=3", f"out={folder.parent / 'whole'}")
    short = recipe(folder, "train.max_steps=4", f"out={folder.parent / 'short'}")
    train(whole)
    assert train(short)["epochs"] == 1
    assert log(short.run_folder())[0]["val_loss"] == log(whole.run_folder())[0]["val_loss"]


def test_an_unreadable_validation_image_does_not_lose_a_long_epoch(folder, monkeypatch):
    whole = recipe(folder, f"out={folder.parent / 'whole'}")
    train(whole)
    monkeypatch.setattr(train_module, "EARLY_SAVE", -1)
    file = next((folder / "val" / "digit1").iterdir())
    good = file.read_bytes()
    file.write_bytes(b"nothing")
    broken = recipe(folder, f"out={folder.parent / 'broken'}")
    with pytest.raises(eit.UserError, match="unreadable validation image"):
        train(broken)
    assert saved_steps(broken.run_folder()) == [4]
    file.write_bytes(good)
    train(broken)
    assert same(weights(whole.run_folder()), weights(broken.run_folder()))
    lines = [[line | {"images_per_s": 0} for line in log(r.run_folder())] for r in (whole, broken)]
    assert lines[0] == lines[1]


def test_a_loss_that_is_not_finite_stops_before_the_update(folder, monkeypatch):
    r = recipe(folder)
    original = loss_module.F.cross_entropy
    calls = []

    def broken(*args, **kwargs):
        calls.extend(["train"] if "label_smoothing" in kwargs else [])
        return original(*args, **kwargs) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(loss_module.F, "cross_entropy", broken)
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 2, step 5, on images digit") as error:
        train(r)
    assert saved_steps(r.run_folder()) == [4]
    # the files of the batch are written down, with their numbers
    file = r.run_folder() / "not-finite-5.txt"
    assert str(file) in str(error.value)
    images, _ = open_data(r.data)
    numbers = SampleOrder(36, 8, 1, 1, 1, r.seed).samples(1)[1, :, 0].tolist()
    assert file.read_text().splitlines() == [f"{i}\t{images.names[i]}" for i in numbers]


def test_a_gradient_that_is_never_finite_stops_fp16_too(folder, monkeypatch):
    """A scaler skips such a step; but not all of them."""
    r = recipe(folder, "train.precision=fp16", "train.epochs=20")
    make = train_module.make_criterion

    def broken(*arguments):
        criterion = make(*arguments)
        return lambda logits, target: criterion(logits, target) + torch.sqrt(0 * logits.sum())

    monkeypatch.setattr(train_module, "make_criterion", broken)
    with pytest.raises(FloatingPointError, match="the gradient is (nan|inf) in epoch 5, step 16"):
        train(r)


@pytest.mark.parametrize("more", [[], ["optim.clip_grad=1"], ["train.accumulate=2", "data.batch_size=4"]])
def test_a_gradient_that_is_not_finite_stops_before_the_update(folder, monkeypatch, more):
    """Though the loss is finite: the square root of 0 has no slope."""
    r = recipe(folder, "train.save_every=1", *more)
    make = train_module.make_criterion

    def broken(*arguments):
        criterion, calls = make(*arguments), []

        def loss(logits, target):
            calls.append(0)
            wrong = len(calls) == 1 + 5 * r.train.accumulate
            return criterion(logits, target) + (torch.sqrt(0 * logits.sum()) if wrong else 0)

        return loss

    monkeypatch.setattr(train_module, "make_criterion", broken)
    with pytest.raises(FloatingPointError, match="the gradient is (nan|inf) in epoch 2, step 5, on images digit"):
        train(r)
    folder_, _ = newest_checkpoint(r.run_folder())
    assert folder_.name == "step-5" and all(v.isfinite().all() for v in load_checkpoint(folder_)[0].values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.accumulate=40"], "a batch of 320 .* is larger than the 36 training images"),
        (["data.batch_size=7"], "data.batch_size=7 is odd"),
        (["data.image_size=2"], "img_size=2 is too small"),
        (["model.embed_dim=17"], "embed_dim=17 is not a multiple of num_heads=2"),
        (["model.in_chans=2"], "model.in_chans=2: images are read with 1 or 3 channels"),
        (["model.schedule=[2]"], "1 entries for depth=2"),
        (["model.name=eit_huge"], "unknown model 'eit_huge'"),
        (["model.pretrained=gone.pth"], "no weights at gone.pth"),
        (["model.in_chans=1", "augment.rand_augment=rand-m9"], "augment.rand_augment needs colour images"),
        (["train.device=cuda:7"], "train.device=cuda:7 is not there"),
        (["train.device=gpu"], "train.device=gpu is not one of auto, cpu, mps, cuda, cuda:N"),
        (["augment.rand_augment=foo"], "augment.rand_augment=foo is not a policy that timm knows"),
        (["optim.min_lr=0.1"], r"optim.min_lr=0.1 is larger than the peak rate \(optim.lr=0.00055"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_anything_starts(folder, overrides, message):
    r = recipe(folder, *overrides)
    with pytest.raises(eit.UserError, match=message) as error:
        train(r)
    assert "\n" not in str(error.value)
    assert not (r.run_folder() / "log.jsonl").exists()


# -- Validation, waiting, threads


@pytest.mark.parametrize(
    ("call", "value", "name"),
    [(1, math.nan, "weights"), (3, math.inf, "weights"), (2, math.nan, "moving average of the weights")],
)
def test_a_validation_loss_that_is_not_finite_ends_the_run_in_one_line(folder, monkeypatch, call, value, name):
    calls = []

    def evaluate(*arguments):
        calls.append(0)
        metrics = original(*arguments)
        return replace(metrics, loss=value) if len(calls) == call else metrics

    original = train_module.evaluate
    monkeypatch.setattr(train_module, "evaluate", evaluate)
    r, epoch = recipe(folder, "train.ema_decay=0.9"), (call + 1) // 2
    said = f"the validation loss of the {name} is {value} after epoch {epoch}; earlier checkpoints are intact"
    with pytest.raises(FloatingPointError, match=said):
        train(r)
    assert saved_steps(r.run_folder()) == [4 * e for e in range(epoch - 1, 0, -1)]
    assert len(log(r.run_folder())) == epoch - 1 and "NaN" not in (r.run_folder() / "log.jsonl").read_text()


@pytest.mark.parametrize("error", [StopRequested(), LoaderStalled("no batch")])
def test_a_wait_for_a_batch_that_ends_saves_the_last_step(folder, monkeypatch, error):
    whole, stopped = recipe(folder, f"out={folder.parent / 'whole'}"), recipe(folder)
    train(whole)
    original = train_module.set_seed

    def set_seed(*counters):
        if counters[0] == Stream.STEP and counters[2] == 6:
            signal.raise_signal(signal.SIGTERM)
            raise error
        original(*counters)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "set_seed", set_seed)
        with pytest.raises((Stopped, LoaderStalled), match="stopped by SIGTERM; run the same|no batch"):
            train(stopped)
    assert saved_steps(stopped.run_folder()) == [6, 4]
    train(stopped)
    assert same(weights(whole.run_folder()), weights(stopped.run_folder()))
    assert [line["val_loss"] for line in log(whole.run_folder())] == [
        line["val_loss"] for line in log(stopped.run_folder())
    ]


def test_a_run_in_a_background_thread_trains_as_in_the_main_one(folder):
    """As in a server, or in a notebook's cell that starts one: Python sets signal handlers in the main thread alone."""
    with ThreadPoolExecutor(1) as pool:
        summary = pool.submit(train, recipe(folder)).result()
    assert summary == train(recipe(folder))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda state: state["optimizer"].clear(), "does not fit this run: "),
        (lambda state: state["progress"]["last"].update(epoch=9), "does not fit this run: step 5 is not in epoch 11"),
        (
            lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(7)),
            "exp_avg of the optimizer has sh",
        ),
        (lambda state: state["progress"]["fixed"].update(global_batch=9), "was trained with another global_batch: 9"),
    ],
)
def test_a_state_that_does_not_fit_the_run_is_one_line_and_changes_nothing(folder, monkeypatch, spoil, said):
    r = recipe(folder, "train.save_every=5")
    train_until_killed(r, 6, monkeypatch)
    before = (r.run_folder() / "log.jsonl").read_bytes()

    def load(checkpoint):
        weights, averaged, state = load_checkpoint(checkpoint)
        spoil(state)
        return weights, averaged, state

    monkeypatch.setattr(train_module, "load_checkpoint", load)
    with pytest.raises(eit.UserError, match=said) as error:
        train(r)
    assert "\n" not in str(error.value) and (r.run_folder() / "log.jsonl").read_bytes() == before
