"""Optimizer, learning rate and schedule."""

import pytest
import torch

import eit
from eit.config import load_recipe
from eit.data.order import SampleOrder
from eit.training.optim import load_optimizer, make_lr_scheduler, make_optimizer


def test_the_schedule_starts_at_step_0_and_ends_at_the_lowest_rate(folder):
    r = load_recipe("imagenet_mini")
    order = SampleOrder(1_281_167, 128, 1, 8, 3, 0)
    model = eit.create_model("eit_mini", depth=1)
    optimizer = make_optimizer(r, model, order)
    schedule = make_lr_scheduler(r, optimizer, order)

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


def test_each_layer_learns_slower_than_the_next():
    r = load_recipe("digits", ["optim.layer_decay=0.5", "optim.warmup_lr=1e-3", "train.warmup_epochs=0"])
    model = eit.create_model("eit_mini", depth=3)
    optimizer = make_optimizer(r, model, SampleOrder(64, 64, 1, 1, 1, 0))
    make_lr_scheduler(r, optimizer, SampleOrder(64, 64, 1, 1, 1, 0)).step_update(0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    of = {name: rate[id(p)] / 3e-3 for name, p in model.named_parameters()}
    assert of["head.weight"] == pytest.approx(1)
    expected = {
        "norm": 0.5,
        "blocks.2": 0.5,
        "blocks.1": 0.25,
        "blocks.0": 0.125,
        "patch_embed": 0.0625,
        "cls_token": 0.0625,
    }
    for part, share in expected.items():
        assert {round(v, 6) for name, v in of.items() if name.startswith(part)} == {share}


def stepped(*settings):
    """An AdamW that took a step, and its parameters."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), **dict(settings))
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.clear(),
        lambda state: state.update(param_groups=[]),
        lambda state: state["param_groups"][0].update(weight_decay="x"),
        lambda state: state["param_groups"][0].update(betas=[0.9]),
        lambda state: state["param_groups"][0].update(eps=None),
        lambda state: state["state"][0].update(exp_avg=torch.zeros(7)),
        lambda state: state["state"][0].update(exp_avg=torch.zeros(2, 3, 4)),
        lambda state: state["param_groups"][0].update(params=[0]),
    ],
    ids=range(8),
)
def test_a_state_that_does_not_fit_the_optimizer_is_an_error(spoil):
    state = stepped().state_dict()
    spoil(state)
    with pytest.raises((ValueError, KeyError, TypeError)):
        load_optimizer(stepped(), state)


def test_the_state_of_an_equal_optimizer_is_restored():
    first, second = stepped(), stepped(("lr", 1e-4))
    load_optimizer(second, first.state_dict())
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"]
    for one, other in zip(first.state.values(), second.state.values(), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
