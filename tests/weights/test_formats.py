"""Files that other training loops wrote, and files that would fill the memory."""

import argparse
import datetime
import fractions
import pathlib
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

import eit
from eit.weights.formats import read_pickle, read_weights, strip_prefixes

STATE = {"head.weight": torch.arange(6.0).view(2, 3), "norm.num_batches_tracked": torch.tensor(7)}


def same(state):
    return list(state) == list(STATE) and all(torch.equal(state[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        dict(model=STATE, optimizer=dict(state={}, param_groups=[])),
        dict(state_dict=STATE, epoch=3),
        dict(model_state_dict=STATE, loss=0.1, optimizer_state_dict=dict(state={0: dict(step=torch.ones(1))})),
        dict(net=STATE, acc=91.0),
        dict(state_dict_ema=STATE),
        dict(model_ema=STATE),
        dict(ema=dict(state_dict=STATE)),
        dict(model=dict(name="vit", depth=3), state_dict=STATE),  # `model` is a configuration
        dict(weights=STATE, meta=dict(classes=["a"])),  # no usual key, but the only state dict
        dict(checkpoint=STATE, args=argparse.Namespace(lr=1)),
        {"state_dict": {f"model.{name}": tensor for name, tensor in STATE.items()}},
        {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()},
        {"n_averaged": torch.tensor(3), **{f"module.{name}": tensor for name, tensor in STATE.items()}},
        {f"backbone.net.{name}": tensor for name, tensor in STATE.items()},
    ],
    ids=lambda content: ",".join(map(str, content))[:50],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_state_dict_of_any_loop_is_found(tmp_path, content, zipped):
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert same(read_weights(tmp_path / "w.pth")[0])


def test_raw_weights_are_taken_next_to_averaged_ones_and_a_line_says_so(tmp_path, capsys):
    averaged = {name: tensor + 1 for name, tensor in STATE.items()}
    for raw, ema in (("model", "model_ema"), ("state_dict", "state_dict_ema"), ("net", "ema")):
        torch.save({ema: averaged, raw: STATE}, tmp_path / "w.pth")
        assert same(read_weights(tmp_path / "w.pth")[0])
        said = " ".join(capsys.readouterr().err.split())
        assert f"weights under {raw}, {ema}: those under {raw} are used" in said


def test_a_prefix_of_some_names_is_a_part_of_them():
    for names in (["model.a", "head.b"], ["model", "model.a"], ["net.a", "module.b"], []):
        state = {name: torch.ones(1) for name in names}
        assert strip_prefixes(state) == state


@pytest.mark.parametrize(
    "value",
    [
        np.float64(91.2),
        np.float32(1),
        np.bool_(True),
        np.arange(6).reshape(2, 3),
        np.random.default_rng(0).normal(size=3).astype(np.float16),
        np.random.RandomState(0).get_state(),
        pathlib.Path("runs/x"),
        pathlib.PureWindowsPath(r"C:\runs"),
        argparse.Namespace(job_dir=pathlib.PurePosixPath("x"), lr=np.float64(1e-3)),
        types.SimpleNamespace(a=1),
        datetime.datetime(2026, 1, 2),
        datetime.timedelta(seconds=3),
        {1, 2},
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_run_nothing_do_not_close_a_file(tmp_path, value):
    torch.save(dict(model=STATE, extra=value), tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth")[0])
    read = read_pickle(tmp_path / "w.pth")["extra"]
    assert str(read) == str(value) or isinstance(value, argparse.Namespace)


@pytest.mark.parametrize("value", [fractions.Fraction(1, 2), torch.nn.Linear(1, 1), np.array([{}]), print, slice(3)])
def test_other_objects_are_refused_with_a_way_out(tmp_path, value):
    torch.save(dict(model=STATE, extra=value), tmp_path / "w.pth")
    with pytest.raises(eit.UserError, match=r"w\.pth is refused: .*torch\.save\(model\.state_dict\(\)") as error:
        read_weights(tmp_path / "w.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (dict(epoch=3, best=0.5), ["its keys are epoch, best", "torch.save(model.state_dict(), 'weights.pth')"]),
        (dict(model=dict(a=1)), ["its keys are model", "under model, state_dict"]),
        (dict(one=STATE, two=STATE), ["its keys are one, two", "torch.save(checkpoint['one'], 'weights.pth')"]),
        (torch.ones(3), ["of the type Tensor", "torch.save(model.state_dict(), 'weights.pth')"]),
        ({}, ["of the type dict"]),
    ],
)
def test_a_file_without_a_state_dict_says_what_was_found(tmp_path, content, said):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(eit.UserError) as error:
        read_weights(tmp_path / "w.pth")
    assert all(part in str(error.value) for part in said) and "\n" not in str(error.value)


def test_a_checkpoint_that_holds_itself_ends(tmp_path):
    content = dict(epoch=1)
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(eit.UserError, match="holds no weights"):
        read_weights(tmp_path / "w.pth")


def test_the_content_decides_not_the_suffix(tmp_path):
    state = {"head.weight": torch.ones(2, 3)}
    for name in ("w.safetensors", "w.pth", "w.bin", "w.ckpt"):
        torch.save(state, tmp_path / name)
        assert torch.equal(read_weights(tmp_path / name)[0]["head.weight"], state["head.weight"])
        safetensors.torch.save_file(state, tmp_path / name)
        assert torch.equal(read_weights(tmp_path / name)[0]["head.weight"], state["head.weight"])


# -- Small files of large tensors


def deflated(file, tmp_path):
    """The archive with compressed members: what a few megabytes of zeros make small."""
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    return tmp_path / "small.pth"


@pytest.mark.parametrize("suffix", ["pth", "pt2"])
def test_compressed_members_are_refused(tmp_path, suffix):
    torch.save(dict(model={"head.weight": torch.zeros(1000, 1000)}), tmp_path / "w.pth")
    small = deflated(tmp_path / "w.pth", tmp_path).rename(tmp_path / f"small.{suffix}")
    assert small.stat().st_size < 20_000
    with pytest.raises(eit.UserError, match="members are compressed"):
        read_weights(small)


def test_members_that_claim_more_than_the_file_are_refused(tmp_path):
    torch.save(STATE, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    at = content.find(b"PK\x01\x02")
    content[at + 20 : at + 28] = (2**31).to_bytes(4, "little") * 2  # compressed and plain size
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(eit.UserError, match="claim to be larger than the file"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(1, 250).expand(20_000_000, 250), "stand for tensors of 20,000,000,032 bytes"),
        (torch.zeros(1).expand(1 << 40), "stand for tensors of"),
        (torch.zeros(4, 4, device="meta"), "without values"),
        (torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (10**6, 10**6)), "sparse"),
    ],
    ids=["rows", "one", "meta", "sparse"],
)
def test_tensors_that_are_larger_than_their_file_are_refused(tmp_path, tensor, said, zipped):
    torch.save(STATE | {"head.bias": tensor}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(eit.UserError, match=said) as error:
        read_weights(tmp_path / "w.pth")
    assert "\n" not in str(error.value)


def test_tied_weights_are_in_the_file_once_and_read(tmp_path):
    tied = torch.randn(700, 700)
    torch.save({"head.weight": tied, "embed.weight": tied}, tmp_path / "w.pth")
    assert torch.equal(read_weights(tmp_path / "w.pth")[0]["embed.weight"], tied)


@pytest.mark.parametrize(
    "names",
    [
        ["model.head.weight", "model.norm.bias", "criterion.weight"],
        ["net.module.head.weight", "net.module.norm.bias", "train_acc.tp", "val_acc.tp"],
        ["model.head.weight", "model.norm.bias", "ema_model.module.head.weight"],
        ["network.fc.weight", "loss.center"],
    ],
)
def test_a_model_next_to_losses_and_metrics_is_found_and_what_is_left_out_is_said(names, capsys):
    state = {
        name: torch.ones(2, 2) if name.endswith("weight") and "crit" not in name else torch.ones(2) for name in names
    }
    kept = [name.rpartition("module.")[2].removeprefix("model.").removeprefix("network.") for name in names[:2]]
    assert list(strip_prefixes(state)) == [name for name in kept if not name.startswith("loss")]
    assert "left out: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "names",
    [
        ["network.0.weight", "head.weight"],  # VOLO of timm
        ["backbone.norm.weight", "head.weight"],
        ["model.head.weight", "net.head.weight"],  # which one?
        ["model.blocks.0.weight", "student.head.weight"],
    ],
)
def test_parts_of_one_model_stay_together(names):
    state = {name: torch.ones(2, 2) for name in names}
    assert strip_prefixes(state) == state


@pytest.mark.parametrize("name", ["total_ops", "blocks.0.total_params", "n_averaged"])
def test_counters_of_tools_are_no_weights(name):
    assert same(strip_prefixes(STATE | {name: torch.zeros(1, dtype=torch.float64)}))


@pytest.mark.parametrize(
    "content, message",
    [
        (
            STATE | dict(epoch=3),
            r"no tensors: epoch \(int\)\. To save the tensors alone: torch\.save\(\{k: v for k, v in checkpoint",
        ),
        (STATE | dict(mask=None), r"no tensors: mask \(NoneType\)"),
        ({"a": np.zeros(3)} | STATE, r"no tensors: a \(ndarray\)"),
        ({"a": torch.ones(1, dtype=torch.complex64), "b": torch.ones(1).int()}, "none of its tensors has floating"),
    ],
)
def test_what_keeps_a_dictionary_from_being_weights_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(eit.UserError, match=message):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("protocol", [0, 4, 5])
def test_another_pickle_protocol_is_named(tmp_path, protocol):
    torch.save(STATE, tmp_path / "w.pth", pickle_protocol=protocol)
    with pytest.raises(eit.UserError, match="another pickle_protocol than 2"):
        read_weights(tmp_path / "w.pth")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "w.pth").touch()
    with pytest.raises(eit.UserError, match=r"w\.pth is empty$"):
        read_weights(tmp_path / "w.pth")
