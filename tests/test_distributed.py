"""Several processes, as torchrun starts them (gloo), and what they would do on GPUs."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import eit
from eit import distributed
from eit.config import load_recipe
from eit.training.trainer import start_facts
from tests.helpers.commands import run_eit
from tests.helpers.training import TINY

# -- GPUs, of which there are none


class Calls:
    """Notes each call by its name: [(name, arguments, options)]."""

    def __init__(self):
        self.made = []

    def noting(self, name, result=None):
        return lambda *arguments, **options: self.made.append((name, arguments, options)) or result

    def of(self, name):
        return [(arguments, options) for called, arguments, options in self.made if called == name]


@pytest.fixture
def machine(monkeypatch):
    """A machine with GPUs, for which a process of torchrun is started: machine(gpus=8, LOCAL_RANK=3, ...) -> calls."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def make(gpus=0, mps=False, store=None, **variables):
        calls, joined = Calls(), []
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        if "RANK" in variables:
            monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
            monkeypatch.setenv("MASTER_PORT", "1")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", calls.noting("set_device"))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid=f"GPU-{gpu.index}"))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        rank, world = int(variables.get("RANK", 0)), int(variables.get("WORLD_SIZE", 1))
        store = store or dist.HashStore()
        for other in set(range(world)) - {rank}:
            if not store.check([f"eit/gpu/{other}"]):
                store.set(f"eit/gpu/{other}", f"cuda {socket.gethostname()} GPU-of-rank-{other}" if gpus else "cpu")
        monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(store, rank, world)]))
        monkeypatch.setattr(distributed, "_of_this_start", lambda store, *_: store)
        monkeypatch.setattr(distributed, "_waiting", None)
        monkeypatch.setattr(dist, "is_initialized", lambda: bool(joined))
        monkeypatch.setattr(
            dist,
            "init_process_group",
            lambda *arguments, **options: joined.append(calls.noting("join")(*arguments, **options)),
        )
        monkeypatch.setattr(dist, "new_group", calls.noting("new_group", result="the group of gloo"))
        return calls

    return make


RANK_3 = dict(RANK=3, LOCAL_RANK=3, WORLD_SIZE=8)


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(("gpus", "expected"), [(8, "cuda:3"), (1, "cuda:0")])
def test_a_rank_has_the_gpu_of_its_number_or_the_one_that_it_sees(machine, device, gpus, expected):
    """One: srun --gpus-per-task=1."""
    calls = machine(gpus, **RANK_3)
    chosen = distributed.start(device)
    assert chosen == torch.device(expected)
    assert calls.of("set_device") == [((chosen,), {})]


def test_one_process_may_choose_its_gpu(machine):
    calls = machine(gpus=8)
    assert distributed.start("cuda:5") == torch.device("cuda:5")
    assert distributed.start("auto") == torch.device("cuda:0")
    assert not calls.of("join") and not calls.of("new_group")
    machine(gpus=8, RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
    assert distributed.start("cuda:5") == torch.device("cuda:5")


@pytest.mark.parametrize(
    ("device", "there", "said"),
    [
        (
            "cuda:1",
            dict(gpus=8, **RANK_3),
            "train.device=cuda:1 is for one process, and there are 8: give cuda, so that each has its own GPU",
        ),
        (
            "mps",
            dict(mps=True, **RANK_3),
            "train.device=mps is for one process, and there are 8: start one, or give cpu",
        ),
        (
            "auto",
            dict(mps=True, **RANK_3),
            "train.device=mps is for one process, and there are 8: start one, or give cpu",
        ),
        ("cuda", dict(gpus=2, **RANK_3), "train.device=cuda:3 is not there: 2 GPUs are visible"),
        ("cuda:2", dict(gpus=2), "train.device=cuda:2 is not there: 2 GPUs are visible"),
        ("cuda", dict(), "train.device=cuda is not there: 0 GPUs are visible"),
        ("mps", dict(), "train.device=mps is not there: this machine has no Apple GPU, or its macOS is too old"),
    ],
)
def test_a_device_that_a_process_cannot_have_is_one_line_and_no_group_is_joined(machine, device, there, said):
    calls = machine(**there)
    with pytest.raises(eit.UserError) as error:
        distributed.start(device)
    assert str(error.value) == said
    assert calls.made == []
    is_of_all = "is for one process" in said
    assert getattr(error.value, "__notes__", []) == ([distributed.ON_MAIN] if is_of_all else [])  # told once


def test_gpus_are_joined_by_nccl_with_a_short_limit_and_rank_0_is_waited_for_in_gloo(machine):
    calls = machine(gpus=8, **RANK_3)
    device = distributed.start()
    [(backend, options)] = calls.of("join")
    assert backend == ("nccl",) and options["device_id"] == device == torch.device("cuda:3")
    assert options["timeout"] == timedelta(minutes=3) and (options["rank"], options["world_size"]) == (3, 8)
    [(_, options)] = calls.of("new_group")
    assert options["backend"] == "gloo" and options["timeout"] >= timedelta(hours=1)
    assert distributed.start() == device
    assert len(calls.of("join")) == len(calls.of("new_group")) == 1  # a second start joins nothing


def test_cpus_are_joined_by_gloo_and_wait_for_rank_0_as_long(machine):
    calls = machine(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2)
    assert distributed.start() == torch.device("cpu")
    [(backend, options)] = calls.of("join")
    assert backend == ("gloo",) and options.get("device_id") is None
    [(_, options)] = calls.of("new_group")
    assert options["backend"] == "gloo" and options["timeout"] >= timedelta(hours=1)


def joined(devices):
    """What two ranks get that join at the same time, each with a device, on machines called host_0 and so on."""
    store = dist.HashStore()

    def join(rank):
        try:
            distributed._join(torch.device(devices[rank]), store, rank, 2)
        except eit.UserError as error:
            return error

    with ThreadPoolExecutor(2, thread_name_prefix="host") as ranks:
        return list(ranks.map(join, range(2)))


def test_ranks_that_share_a_gpu_are_one_line_on_each(machine):
    """NCCL would fail with an error that does not say so."""
    calls = machine(gpus=2)
    for error in joined(["cuda:1", "cuda:1"]):
        assert str(error) == "ranks 0, 1 share one GPU: start as many processes as there are GPUs"
        assert error.__notes__ == [distributed.ON_MAIN]
    assert calls.made == []


def test_gpus_of_one_machine_are_two_and_so_are_those_of_one_number_on_two_machines(machine, monkeypatch):
    """Of a MIG or a virtual machine the UUID alone may be the same."""
    calls = machine(gpus=2)
    assert joined(["cuda:0", "cuda:1"]) == [None, None]
    monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)
    assert joined(["cuda:0", "cuda:0"]) == [None, None]
    assert len(calls.of("join")) == 4


@pytest.mark.parametrize("devices", [["cuda:0", "cpu"], ["cpu", "cuda:1"]])
def test_ranks_on_devices_of_two_kinds_are_one_line_on_each(machine, devices):
    """Their groups would wait for each other."""
    calls = machine(gpus=2)
    kinds = [device.partition(":")[0] for device in devices]
    for error in joined(devices):
        assert str(error) == f"rank 0 computes on {kinds[0]} and rank 1 on {kinds[1]}: give all the same kind"
    assert calls.made == []


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("text", ["x", "-1", "1.5", ""])
def test_a_variable_that_is_not_a_number_is_one_line(machine, monkeypatch, name, text):
    machine(RANK=0, WORLD_SIZE=2)
    monkeypatch.setenv(name, text)
    with pytest.raises(eit.UserError, match=f"{name}={text} is not a number"):
        distributed.start("cpu")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_that_is_taken_is_one_line(machine, monkeypatch, host):
    machine(RANK=0, WORLD_SIZE=2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("MASTER_ADDR", host)
        monkeypatch.setattr(distributed, "rendezvous", rendezvous)
        with pytest.raises(eit.UserError, match=f"the port of MASTER_PORT={port} is taken: give another --master-port"):
            distributed.start("cpu")


def test_a_rank_0_that_is_not_reached_is_said_and_is_one_line(machine, monkeypatch, capsys):
    machine(RANK=1, WORLD_SIZE=2)
    monkeypatch.setattr(distributed, "SILENT", 0.1)
    monkeypatch.setattr(distributed, "JOIN", timedelta(seconds=2))
    monkeypatch.setattr(distributed, "rendezvous", rendezvous)
    with pytest.raises(eit.UserError, match="rank 1 cannot join the others at 127.0.0.1:1: ") as error:
        distributed.start("cpu")
    assert "\n" not in str(error.value)
    assert "eit: rank 1 waits for the others at 127.0.0.1:1, up to 0:00:02; SIGTERM ends it" in capsys.readouterr().err


@pytest.fixture
def group(monkeypatch):
    """Two ranks, of which this is rank 0; the collectives are noted, and each gives what it was given."""
    calls = Calls()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "_waiting", "the group of gloo")
    for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "broadcast"):
        monkeypatch.setattr(dist, name, calls.noting(name))
    return calls


def groups(calls):
    return [(name, options.get("group")) for name, _, options in calls.made]


def test_what_ranks_tell_each_other_goes_through_gloo(group):
    """NCCL would end the process where one of them takes longer than the limit of a step."""
    distributed.gather({"a": 1})
    assert distributed.on_main(lambda: 7) == 7
    with pytest.raises(eit.UserError, match="x") as error:
        distributed.on_main(lambda: (_ for _ in ()).throw(eit.UserError("x")))
    assert error.value.__notes__ == [distributed.ON_MAIN]
    distributed.sum_over_ranks(torch.zeros(2))
    gloo = "the group of gloo"
    assert groups(group) == [
        ("all_gather_object", gloo),
        ("broadcast_object_list", gloo),
        ("broadcast_object_list", gloo),
        ("all_reduce", gloo),
    ]


FACTS = dict(seed=0, torch="2.14.1", code="abc")


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([FACTS | dict(seed=1)], "seed is 0 on rank 0, 1 on rank 1"),
        ([FACTS, FACTS | dict(torch="2.13")], "torch is 2.14.1 on rank 0, 2.13 on rank 2"),
        ([FACTS | dict(code="d", seed=2)], "seed is 0 on rank 0, 2 on rank 1, code is abc on rank 0, d on rank 1"),
        ([{}], "seed is 0 on rank 0, None on rank 1"),
        ([FACTS | dict(new=1)], "new is None on rank 0, 1 on rank 1"),
    ],
)
def test_ranks_that_do_not_agree_are_one_line_on_each(monkeypatch, others, said):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, *others])
    with pytest.raises(eit.UserError, match=f"the ranks do not agree: {said}") as error:
        distributed.check_agreement(FACTS)
    assert error.value.__notes__ == [distributed.ON_MAIN]
    monkeypatch.setattr(distributed, "gather", lambda value: [value, dict(FACTS)])
    distributed.check_agreement(FACTS)


def test_what_ranks_share_is_the_recipe_but_for_what_belongs_to_a_machine():
    facts = start_facts(load_recipe("digits"))
    assert {"seed", "name", "optim.lr", "train.device", "loss.teacher", "torch", "eit", "code of eit"} <= facts.keys()
    for word in ("out=x", "data.root=there", "data.workers=3"):
        assert start_facts(load_recipe("digits", [word])) == facts
    for word in ("seed=4", "optim.lr=1", "train.epochs=9", "data.batch_size=2", "train.precision=bf16"):
        assert start_facts(load_recipe("digits", [word])) != facts


def test_tensors_on_a_device_are_summed_where_they_are(group):
    on_device = torch.zeros(2, device="meta")
    assert distributed.sum_over_ranks(on_device) is on_device
    assert groups(group) == [("all_reduce", None)] and group.made[0][1] == (on_device,)


def test_the_end_of_a_group_is_the_end_of_both(machine, monkeypatch):
    calls = machine(gpus=8, **RANK_3)
    distributed.start()
    monkeypatch.setattr(dist, "destroy_process_group", calls.noting("destroy"))
    distributed.stop()
    assert calls.of("destroy") == [((), {})] and distributed._waiting is None


# -- Processes


def train(folder, out, ranks, *overrides, **options):
    words = ["train", "cifar10", *TINY, f"data.root={folder}", f"out={out}", *overrides]
    done = run_eit(*words, ranks=ranks, **options)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


DETERMINISTIC = [
    "augment.mixup=0",
    "augment.cutmix=0",
    *(f"model.{name}_rate=0" for name in ("pos_drop", "proj_drop", "attn_drop", "drop_path")),
]


def test_two_processes_train_as_one_with_the_same_global_batch(folder, tmp_path):
    one = train(folder, tmp_path / "one", 0, *DETERMINISTIC, "data.batch_size=8")
    two = train(folder, tmp_path / "two", 2, *DETERMINISTIC, "data.batch_size=4", torchrun=True)
    for a, b in zip(one, two, strict=True):
        for key in ("train_loss", "val_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
        assert (a["step"], a["lr"]) == (b["step"], b["lr"])
    first, second = (eit.load(tmp_path / name / "final.safetensors").state_dict() for name in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=2e-4, rtol=0)

    # and evaluation counts every image once, with the same figures, on any number of ranks
    results = []
    for ranks in (0, 3):
        done = run_eit("eval", tmp_path / "one", "--data", folder, "--batch-size", 5, "--json", ranks=ranks)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0] == results[1]
    assert results[0]["images"] == 12


def test_a_finished_run_and_a_mistake_end_on_all_ranks(folder, tmp_path):
    train(folder, tmp_path / "run", 2)
    again = run_eit("train", "cifar10", *TINY, f"data.root={folder}", f"out={tmp_path / 'run'}", ranks=2)
    assert again.returncode == 0 and again.stderr.count("is finished") == 1
    other = run_eit("train", "cifar10", *TINY, f"data.root={folder}", f"out={tmp_path / 'run'}", "seed=9", ranks=2)
    assert other.returncode != 0
    assert "eit: " in other.stderr and "another recipe (seed: 0 -> 9)" in other.stderr


def test_what_one_rank_meets_is_said_and_counted_for_all(folder, tmp_path):
    for name in ("000.png", "001.png", "002.png"):
        (folder / "train" / "digit1" / name).write_bytes(b"nothing")
    words = ["train", "cifar10", *TINY, f"data.root={folder}", "data.cache=false", f"out={tmp_path / 'run'}"]
    done = run_eit(*words, "data.bad_image_budget=0.09", ranks=2)
    assert done.returncode == 0, done.stderr
    assert all(f"digit1/{name}" in done.stderr for name in ("000.png", "001.png", "002.png"))
    done = run_eit(*words, "data.bad_image_budget=0.06", f"out={tmp_path / 'other'}", ranks=2)
    assert done.returncode != 0
    assert "3 of 36 training images are unreadable, data.bad_image_budget allows 2" in done.stderr


def test_the_accuracy_of_a_run_on_two_ranks_is_that_of_its_weights_with_batch_norm_too(folder, tmp_path):
    words = ["model.name=timm/test_resnet", "data.batch_size=4", "train.ema_decay=0.5"]
    line = train(folder, tmp_path / "run", 2, *words)[-1]
    done = run_eit("eval", tmp_path / "run" / "final.safetensors", "--json", "--batch-size", 4)
    found = json.loads(done.stdout)
    assert found["top1"] == pytest.approx(line["val_top1"]) and found["loss"] == pytest.approx(
        line["val_loss"], rel=1e-5
    )


@pytest.mark.slow
def test_cifar10_learns_on_two_processes(cifar10, tmp_path):
    """A few hundred steps of the real recipe, narrower; loss falls, accuracy leaves chance far behind."""
    small = ["model.embed_dim=60", "model.depth=4", "model.num_heads=6", "data.batch_size=64", "optim.lr=2e-3"]
    short = ["train.epochs=1", "train.warmup_epochs=0.2", f"data.root={cifar10}", f"out={tmp_path / 'run'}"]
    done = run_eit("train", "cifar10", *small, *short, ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert line["step"] == 390
    assert line["train_loss"] < 2.25 and line["val_loss"] < 2.0 and line["val_top1"] > 24
    counts = []
    for ranks in (0, 2, 3):
        done = run_eit("eval", tmp_path / "run", "--json", ranks=ranks)
        counts.append(json.loads(done.stdout))
    assert counts[0] == counts[1] == counts[2] and counts[0]["images"] == 10_000
