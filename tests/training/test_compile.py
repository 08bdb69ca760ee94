"""A compiled run: the mode that the recipe names, compiled once, its rate without the time of compiling."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import eit
from eit import distributed
from eit.data.datasets import open_data
from eit.data.loaders import evaluation_loader
from eit.inference.evaluate import evaluate
from eit.models import ops
from eit.randomness import Stream
from eit.training import trainer as train_module
from eit.training.setup import make_view
from eit.training.trainer import train
from tests.helpers.training import log, recipe

COMPILE = torch.compile


class Stub(torch.nn.Module):
    """Stands for a compiled network; notes how it is called."""

    def __init__(self, network, noted):
        super().__init__()
        self.network, self.noted = network, noted

    def forward(self, x):
        self.noted.append(x)
        return self.network(x)


@pytest.fixture
def stub(monkeypatch):
    """What torch.compile was given, and each batch that the network was."""
    given, batches = [], []

    def compile(network, **options):
        given.append(options)
        return Stub(network, batches)

    monkeypatch.setattr(torch, "compile", compile)
    return given, batches


@pytest.mark.parametrize(
    ("word", "mode"),
    [("true", None), ("default", None), ("reduce-overhead", "reduce-overhead"), ("max-autotune", "max-autotune")],
)
def test_a_run_is_compiled_in_its_mode_for_one_size_and_one_layout(folder, stub, word, mode):
    given, batches = stub
    plain = ["augment.pad_crop=0", "augment.hflip=0"]  # then images come from memory in another layout
    r = recipe(folder, *plain, f"train.compile={word}", "train.max_steps=2")
    train(r)
    assert given == [dict(mode=mode, dynamic=False)]
    assert len(batches) == 2 and all(x.is_contiguous(memory_format=torch.channels_last) for x in batches)
    written = json.loads((r.run_folder() / "environment.json").read_text())
    assert written["compile"] == word.replace("true", "default")


@pytest.mark.parametrize("word", ["off", "false"])
def test_a_run_is_not_compiled_where_that_is_off(folder, stub, word):
    train(recipe(folder, f"train.compile={word}", "train.max_steps=1"))
    assert stub == ([], [])


@pytest.fixture
def three_ranks(monkeypatch):
    """This process is one of three, whose gradients stay its own."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)

    def parallel(model, **options):
        network = DistributedDataParallel(model, **options)
        network.register_comm_hook(None, noop_hook)  # the fake group has no futures
        return network

    monkeypatch.setattr(train_module, "DistributedDataParallel", parallel)
    monkeypatch.setattr(distributed, "start", lambda device: torch.device("cpu"))
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    monkeypatch.setattr(distributed, "on_main", lambda call: call())
    yield
    dist.destroy_process_group()


@pytest.fixture
def counted(monkeypatch):
    """torch.compile without a compiler, and how often it would be asked for code."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(
        torch, "compile", lambda network, mode, dynamic: COMPILE(network, backend=counter, dynamic=dynamic)
    )
    yield counter
    torch._dynamo.reset()


def test_with_three_ranks_the_network_is_compiled_once(folder, three_ranks, counted, monkeypatch):
    """For the backward pass that arranges DDP's buckets, and for all batches after it."""
    warmed, warm_up = [], train_module.warm_up

    def noted(network, x, precision):
        warm_up(network, x, precision)
        warmed.append(counted.frame_count)

    monkeypatch.setattr(train_module, "warm_up", noted)
    train(recipe(folder, "train.compile=default", "train.max_steps=2"))
    assert warmed == [1] and counted.frame_count == 1


@pytest.mark.parametrize("compile", ["off", "default"])
def test_each_epoch_evaluates_the_weights_that_it_has_trained(folder, counted, monkeypatch, compile):
    """Though padded weights are kept in evaluation, and fused optimizers say nothing of a change."""
    monkeypatch.setattr(ops, "PAD_HEADS_ON", {"cpu"})
    narrow = ["model.family=vit", "model.patch_size=4", "model.embed_dim=24"]  # two heads of 12 channels
    r = recipe(folder, *narrow, f"train.compile={compile}", "optim.lr=0.01")
    train(r)
    assert counted.frame_count == (compile == "default")
    monkeypatch.setattr(ops, "PAD_HEADS_ON", set())
    _, images = open_data(r.data)
    loader = evaluation_loader(images, make_view(r), 8, 0, torch.device("cpu"))
    lines = log(r.run_folder())
    assert abs(lines[0]["val_loss"] - lines[1]["val_loss"]) > 1e-3
    final = evaluate(eit.load(r.run_folder() / "final.safetensors"), loader)
    assert final.loss == pytest.approx(lines[-1]["val_loss"], rel=1e-5)


@pytest.mark.parametrize(("compile", "rates"), [("default", [8, 8]), ("off", [8 * 4 / 113.0, 8])])
def test_the_rate_leaves_out_the_steps_that_compile(folder, stub, monkeypatch, compile, rates):
    """They take 100, 10 and 2 seconds here, and each later one takes one."""
    now, seconds, seed = [0.0], iter([100.0, 10.0, 2.0]), train_module.set_seed

    def set_seed(*counters):
        if counters[0] == Stream.STEP:
            now[0] += next(seconds, 1.0)
        seed(*counters)

    monkeypatch.setattr(train_module, "set_seed", set_seed)
    monkeypatch.setattr(train_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    r = recipe(folder, f"train.compile={compile}", "train.epochs=2")
    summary = train(r)
    assert [line["images_per_s"] for line in log(r.run_folder())] == pytest.approx(rates, abs=0.05)
    assert summary["seconds"] == 117  # of all
