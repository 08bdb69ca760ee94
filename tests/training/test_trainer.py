import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import yaml

import eit
from eit.config import load_recipe
from eit.data import datasets as data_module
from eit.data.datasets import open_data
from eit.data.order import SampleOrder
from eit.randomness import Stream
from eit.training import loss as loss_module
from eit.training import trainer as train_module
from eit.training.checkpoint import load_checkpoint, newest_checkpoint, saved_steps
from eit.training.run_folder import Run
from eit.training.trainer import make_optimizer, make_schedule, train
from tests.conftest import TINY, run_eit


def recipe(folder, *overrides, base="cifar10"):
    return load_recipe(base, [*TINY, f"data.root={folder}", f"out={folder.parent / 'run'}", *overrides])


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run, name="final"):
    return eit.load(run / f"{name}.safetensors").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- The run folder


def line_of(epoch):
    line = dict(epoch=epoch, step=epoch, train_loss=1.0, val_loss=1.0, val_top1=1.0, ema_top1=None, lr=1.0)
    return line | dict(images_per_s=1.0)


@pytest.mark.parametrize("ended", ["finished", "stopped", "failed"])
def test_curves_are_drawn_now_and_then_and_whole_at_the_end(folder, monkeypatch, ended):
    drawn = []
    monkeypatch.setattr("eit.plots.curves", lambda lines, file: drawn.append(len(lines)))
    expected = pytest.raises(OSError, match="disk") if ended == "failed" else nullcontext()
    with expected, Run(folder.parent / "run", recipe(folder)) as run:
        run.start_logging({}, 0)
        for epoch in range(3):
            run.log(line_of(epoch), 3)
        if ended == "finished":
            run.finish()
        if ended == "failed":
            raise OSError("disk")
    assert drawn == [1, 3]


@pytest.mark.parametrize("error", [None, OSError("disk")])
def test_curves_that_cannot_be_drawn_replace_no_error_and_release_the_folder(folder, monkeypatch, error):
    def fail(lines, file):
        if len(lines) > 1:
            raise RuntimeError("curves")

    monkeypatch.setattr("eit.plots.curves", fail)
    expected = pytest.raises(OSError, match="disk") if error else pytest.raises(RuntimeError, match="curves")
    with expected, Run(folder.parent / "run", recipe(folder)) as run:
        run.start_logging({}, 0)
        for epoch in range(2):
            run.log(line_of(epoch), 3)
        if error:
            raise error
    with Run(folder.parent / "run", recipe(folder)):
        pass


def test_a_run_leaves_what_it_promises(folder):
    r = recipe(folder, "train.ema_decay=0.9")
    summary = train(r)
    run = r.run_folder()
    assert {p.name for p in run.iterdir()} >= {
        "recipe.yaml", "environment.json", "log.jsonl", "curves.png", "summary.json", "checkpoints", "best.safetensors",
        "final.safetensors", "tensorboard",
    }  # fmt: skip
    assert set(summary) == {
        "best_top1", "best_epoch", "last_top1", "last_top5", "last_ema_top1", "epochs", "seconds", "params",
    }  # fmt: skip
    assert json.loads((run / "summary.json").read_text()) == summary
    lines = log(run)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert [line["step"] for line in lines] == [4, 8]
    assert set(lines[0]) == {
        "epoch", "step", "lr", "train_loss", "val_loss", "val_top1", "val_top5", "ema_top1", "images_per_s",
    }  # fmt: skip
    assert summary["best_top1"] == max(line["val_top1"] for line in lines)
    assert summary["last_top1"] == lines[-1]["val_top1"] and summary["last_ema_top1"] == lines[-1]["ema_top1"]
    assert saved_steps(run) == [8, 4]
    assert yaml.safe_load((run / "recipe.yaml").read_text()) == r.model_dump(mode="json")
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and environment["cpu"]["capability"]
    card = eit.load(run).card
    assert card.classes == ["digit0", "digit1", "digit2"] and card.recipe["name"] == "cifar10"
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_run_says_so_and_another_recipe_is_refused(folder, capsys):
    r = recipe(folder)
    summary = train(r)
    before = (r.run_folder() / "final.safetensors").read_bytes()
    assert train(r) == summary
    assert "is finished" in capsys.readouterr().err
    assert train(recipe(folder, "data.workers=1")) == summary
    with pytest.raises(eit.UserError, match=r"another recipe \(optim\.lr: 0\.00055 -> 0\.1\)"):
        train(recipe(folder, "optim.lr=0.1"))
    assert (r.run_folder() / "final.safetensors").read_bytes() == before


def test_a_folder_that_is_no_run_folder_is_left_alone(folder):
    """The data themselves, say."""
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(eit.UserError, match="is not empty, and no run folder"):
        train(recipe(folder, f"out={folder}"))
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_finished_run_on_other_data_says_so(folder):
    train(recipe(folder))
    next((folder / "train" / "digit0").iterdir()).rename(folder / "train" / "digit1" / "new.png")
    with pytest.raises(eit.UserError, match="was trained with another data"):
        train(recipe(folder))


def test_a_second_process_is_kept_out(folder):
    r = recipe(folder)
    r.run_folder().mkdir()
    lock = str(r.run_folder() / ".lock")
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print(flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(eit.UserError, match="is in use by another process"):
        train(r)
    holder.kill()  # kill -9 frees it
    holder.wait()
    train(r)


def test_a_recipe_may_change_until_something_is_trained(folder, monkeypatch):
    r = recipe(folder)
    train_until_killed(r, 0, monkeypatch)
    train(recipe(folder, "optim.lr=1e-3"))


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


class Killed(BaseException):
    """Stands for the process's end in the tests that stay in one process."""


def train_until_killed(recipe, step, monkeypatch):
    """The process ends in the middle of `step`: nothing after its forward pass happens."""
    original = train_module.set_seed

    def set_seed(*counters):
        if counters[0] == Stream.STEP and counters[2] == step:
            raise Killed
        original(*counters)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "set_seed", set_seed)
        with pytest.raises(Killed):
            train(recipe)


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
        files = [
            eit.weights.load.read_safetensors(r / "checkpoints" / "step-12" / f"{name}.safetensors")[0] for r in (a, b)
        ]
        assert same(*files)
    lines = [[{k: v for k, v in line.items() if k != "images_per_s"} for line in log(r)] for r in (a, b)]
    assert lines[0] == lines[1]


def test_what_was_logged_after_the_checkpoint_is_logged_once(folder, monkeypatch):
    """The process dies between the log's line and the checkpoint of the same epoch, in the middle of a second line."""
    r = recipe(folder, "train.epochs=3")
    original = train_module.write_state

    def write_state(run, step, *rest):
        if step == 8:
            raise Killed
        return original(run, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "write_state", write_state)
        with pytest.raises(Killed):
            train(r)
    assert [line["step"] for line in log(r.run_folder())] == [4, 8]
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


def test_a_signal_saves_and_the_same_command_continues(tmp_path):
    """Ctrl-C here; SIGTERM and SIGUSR1 are in test_reliability."""
    words = ["train", "digits", "train.epochs=3", "train.warmup_epochs=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "eit", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for line in process.stderr:
        if line.startswith("epoch 1"):
            break
    process.send_signal(signal.SIGINT)
    err = process.stderr.read()
    assert process.wait(60) == 128 + signal.SIGINT, err
    assert "the same command continues" in err and "Traceback" not in err
    done = run_eit(*words, cwd=tmp_path)
    assert done.returncode == 0 and "continuing" in done.stderr


# -- What is learnt


def test_shuffled_labels_teach_nothing(tmp_path, monkeypatch):
    """The digits recipe reaches 98% on true labels; on shuffled ones it must stay near chance, or labels leak."""

    def shuffled(config):
        train_images, val_images = data_module.open_data(config)
        order = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0)).tolist()
        train_images.labels = [train_images.labels[i] for i in order]
        return train_images, val_images

    monkeypatch.setattr(train_module, "open_data", shuffled)
    summary = train(load_recipe("digits", [f"out={tmp_path}", "train.epochs=12", "train.warmup_epochs=1"]))
    assert summary["last_top1"] < 20


def test_true_labels_do(tmp_path):
    summary = train(load_recipe("digits", [f"out={tmp_path}", "train.epochs=12", "train.warmup_epochs=1"]))
    assert summary["last_top1"] > 50


# -- Parts


def test_the_schedule_starts_at_step_0_and_ends_at_the_lowest_rate(folder):
    r = load_recipe("imagenet_mini")
    order = SampleOrder(1_281_167, 128, 1, 8, 3, 0)
    model = eit.create_model("eit_mini", depth=1)
    optimizer = make_optimizer(r, model, order)
    schedule = make_schedule(r, optimizer, order)

    def rate(step):
        schedule.step_update(step)
        return optimizer.param_groups[0]["lr"]

    steps = order.steps
    assert steps == 1251
    assert rate(0) == pytest.approx(1e-6)
    assert rate(1) > 1e-6
    peak = 1e-3 * 1024 / 512
    assert rate(5 * steps) == pytest.approx(peak, rel=1e-3)
    # The published log, whose schedule is an epoch late: epoch 2 is our epoch 1, epoch 299 our epoch 298.
    assert rate(steps) == pytest.approx(4.0080e-04, rel=1e-3)
    assert rate(298 * steps) == pytest.approx(1.0218e-05, rel=1e-3)
    assert rate(300 * steps - 1) == pytest.approx(1e-5, rel=1e-3)


def test_norms_biases_and_tokens_are_not_decayed():
    r = load_recipe("imagenet_mini", ["optim.lr_batch=null"])
    model = eit.create_model("eit_mini", depth=2, pos_embed="learned")
    optimizer = make_optimizer(r, model, SampleOrder(10, 1, 1, 1, 1, 0))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        spared = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
        assert decay[id(p)] == (0 if spared else 0.05), name
    assert optimizer.param_groups[0]["initial_lr" if "initial_lr" in optimizer.param_groups[0] else "lr"] == 1e-3


def test_the_rate_follows_the_global_batch():
    for accumulate, world, lr in ((1, 1, 0.25e-3), (2, 1, 0.5e-3), (2, 8, 4e-3)):
        order = SampleOrder(10_000, 128, accumulate, world, 1, 0)
        optimizer = make_optimizer(load_recipe("imagenet_mini"), eit.create_model("eit_mini", depth=1), order)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)


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
        (
            ["data.batch_size=40"],
            "a batch of 40 .* is larger than the 36 training images; set data.batch_size=36 or less",
        ),
        (["data.batch_size=7"], "data.batch_size=7 is odd"),
        (["data.image_size=2"], "img_size=2 is smaller than the stem needs"),
        (["model.embed_dim=17"], "embed_dim=17 is not a multiple of num_heads=2"),
        (["model.in_chans=2"], "model.in_chans=2: images are read with 1 or 3 channels"),
        (["model.schedule=[2]"], "1 entries for depth=2"),
        (["model.name=eit_huge"], "unknown model 'eit_huge'"),
        (["model.pretrained=gone.pth"], "no weights at gone.pth"),
        (["model.in_chans=1", "augment.rand_augment=rand-m9"], "augment.rand_augment needs colour images"),
        (["train.device=cuda:7"], "device cuda:7 is not there"),
        (["train.device=gpu"], "device 'gpu' is not one of auto, cpu, mps, cuda, cuda:N"),
        (["augment.rand_augment=foo"], "augment.rand_augment=foo: timm does not know this policy"),
        (["optim.min_lr=0.1"], r"optim.min_lr=0.1 is more than the rate itself \(optim.lr=0.00055"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_anything_starts(folder, overrides, message):
    r = recipe(folder, *overrides)
    with pytest.raises(eit.UserError, match=message) as error:
        train(r)
    assert "\n" not in str(error.value)
    assert not (r.run_folder() / "log.jsonl").exists()
