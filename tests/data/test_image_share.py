"""How much of the class token depends on the image: closed forms, plain loops, and the fault that it shows."""

import math

import pytest
import timm
import torch

import eit
from eit.analysis.analyzed_model import AnalyzedModel
from eit.analysis.class_token import MIN_SHARE, ClassTokenMeter
from eit.analysis.findings import faults, percent, token_table
from eit.analysis.inputs import LoadedModel
from eit.analysis.measure import analyze
from eit.data.images import Preprocessing

SMALL = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, embed_dim=24, depth=3, num_heads=4, num_classes=5)


def small(**arguments):
    torch.manual_seed(0)
    return eit.EIT(**(SMALL | arguments)).eval()


def images(count=6, seed=0):
    """Images that differ in their mean as well, as photos do."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=draws) + torch.randn(count, 3, 1, 1, generator=draws)


def meter_of(x, conv=0, where="block", parts=1):
    meter = ClassTokenMeter(2, where, conv)
    for part in x.chunk(parts):
        meter.add(part)
    return meter.result()


def measured(model, x, label="one", state="trained"):
    loaded = LoadedModel(label, state, None, Preprocessing(32, 32, "bicubic", (0.5,) * 3, (0.5,) * 3), f"runs/{label}")
    return AnalyzedModel(loaded, analyze(model, x), "#0072b2", "o")


# -- Closed forms -----------------------------------------------------------------------------------------------------


def test_a_token_that_is_the_same_for_every_image_has_share_zero():
    (found, attention) = meter_of(torch.tensor([3.0, 4.0]).expand(7, 2), parts=3)
    assert (found.share, found.norm, found.part, found.channels) == (0, 5, "all", 2)
    assert attention.part == "attention" and attention.norm == 5


def test_independent_random_tokens_have_a_share_of_almost_one():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    found = meter_of(x)[0]
    assert found.share == pytest.approx(1 - 1 / 200, abs=3e-3)  # the mean of n images has 1 / n of the energy
    assert found.norm == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize("constant, step", [(1.0, 1.0), (1.0, 1e-3), (1e3, 1e-4), (0.0, 2.0)])
def test_a_constant_and_a_step_have_the_share_of_their_squares(constant, step):
    x = torch.tensor([[constant + step], [constant - step]], dtype=torch.float64).repeat(5, 1)
    found = meter_of(x, parts=4)[0]
    assert found.share == pytest.approx(step**2 / (constant**2 + step**2), rel=1e-6)
    assert found.norm == pytest.approx(math.hypot(constant, step))


def test_convolved_and_attending_channels_stand_apart():
    x = torch.zeros(4, 5)
    x[:, :2] = 2.0  # the same for all images
    x[:, 2:] = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    found = {token.part: token for token in meter_of(x, conv=2)}
    assert {part: (t.channels, t.share) for part, t in found.items()} == {
        "all": (5, pytest.approx(3 / 11)),
        "conv": (2, 0),
        "attention": (3, pytest.approx(1)),
    }
    assert [token.part for token in meter_of(x, conv=5)] == ["all", "conv"]
    assert [token.part for token in meter_of(x, where="mlp")] == ["all"]


def test_there_is_no_share_of_one_image_nor_of_nothing():
    assert math.isnan(meter_of(torch.ones(1, 3))[0].share)
    nothing = meter_of(torch.zeros(4, 3))[0]
    assert math.isnan(nothing.share) and nothing.norm == 0


def test_plain_loops_agree():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double() + 0.5
    rows = x.tolist()
    mean = [sum(row[c] for row in rows) / 9 for c in range(4)]
    energy = sum(value**2 for row in rows for value in row) / 9
    found = meter_of(x, parts=4)[0]
    assert found.share == pytest.approx(1 - sum(m**2 for m in mean) / energy, rel=1e-9)
    assert found.norm == pytest.approx(math.sqrt(energy), rel=1e-9)


# -- In a model -------------------------------------------------------------------------------------------------------


def share_of(x):
    x = x.double()
    return 1 - (x.mean(dim=0).square().sum() / x.square().sum(dim=1).mean()).item()


def test_what_is_measured_are_the_models_own_class_tokens():
    """By hand, from the model's blocks: the token before and after each, and what mixer and MLP add."""
    model, x = small(schedule=(0, 12, 24), cls_conv="mean"), images()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    found = analyze(model, iter(x.split(4)))
    by_place = {(t.layer, t.where, t.part): t for t in found.class_token}
    expected = {}
    with torch.no_grad():
        tokens, h, w = model.embed(x)
        expected[0, "stem", "all"] = expected[0, "stem", "conv"] = tokens[:, 0]  # the first layer convolves alone
        for number, block in enumerate(model.blocks, start=1):
            conv = block.attn.conv_channels
            mixed = block.attn(block.norm1(tokens), h, w)
            passed = block.mlp(block.norm2(tokens + mixed))
            tokens = block(tokens, h, w)
            expected[number, "mlp", "all"] = passed[:, 0]
            for where, y in (("mixer", mixed[:, 0]), ("block", tokens[:, 0])):
                expected[number, where, "all"] = y
                if conv:
                    expected[number, where, "conv"] = y[:, :conv]
                if conv < 24:
                    expected[number, where, "attention"] = y[:, conv:]
        logits = model(x)
    assert by_place.keys() == expected.keys()
    for key, y in expected.items():
        assert by_place[key].share == pytest.approx(share_of(y), rel=1e-4, abs=1e-9), key
        assert by_place[key].norm == pytest.approx(y.double().square().sum(dim=1).mean().sqrt().item(), rel=1e-5), key
    assert found.class_token_share == [by_place[n, "block", "all"].share for n in (1, 2, 3)]
    assert found.logit_spread == pytest.approx(logits.std(dim=0).mean().item(), rel=1e-4)
    assert found.reads_class_token


def test_the_update_of_a_block_of_timm_is_what_it_adds():
    """Behind its layer scale."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, init_values=0.1).eval()
    x, inputs = images(), []
    found = analyze(model, x)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        block.norm2.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(x)
    for layer, (before, after) in enumerate(zip(inputs[::2], inputs[1::2], strict=True), start=1):
        (token,) = (t for t in found.class_tokens("mixer") if t.layer == layer)
        assert token.share == pytest.approx(share_of((after - before)[:, 0]), rel=1e-3)


def test_the_logits_of_one_image_have_no_spread_and_it_is_said():
    found = analyze(small(), images(1))
    assert math.isnan(found.logit_spread) and all(math.isnan(share) for share in found.class_token_share)
    assert any(line.startswith("image-dependent share of the class token: one image") for line in found.missing)
    assert faults([measured(small(), images(1))])[0].startswith("one: in all layers ")


# -- The fault --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["eit", "lsra"])
def test_a_model_whose_class_token_is_drowned_is_named_first(schedule):
    """At initial values the convolved channels add the same LayerNorm(x) for every image (cls_conv=identity)."""
    one = measured(small(schedule=schedule), images())
    line = faults([one])[0]
    share = one.analysis.class_token_share[-1]
    assert share < 1e-4 and line.startswith("one: the class token hardly depends on the image.")
    assert f"the last layer (3), {percent(share)} of its energy" in line
    assert "Its convolved channels receive nearly the same update" in line and "cls_conv" in line
    (first,) = (t for t in one.analysis.class_tokens("mixer", "conv") if t.layer == 1)
    (attention,) = (t for t in one.analysis.class_tokens("mixer", "attention") if t.layer == 1)
    assert first.share < 1e-12 and attention.share > 0.1 and first.norm > 100 * attention.norm
    assert token_table([one])[1][0][1] == percent(share)


@pytest.mark.parametrize(
    "arguments",
    [dict(cls_conv="zero"), dict(cls_conv="mean"), dict(schedule="lsra", cls_conv="zero"), dict(schedule="vit")],
    ids=str,
)
def test_a_model_whose_class_token_knows_the_image_is_not(arguments):
    one = measured(small(**arguments), images())
    assert one.analysis.class_token_share[-1] > MIN_SHARE
    assert not any("class token" in line for line in faults([one]))


def test_the_weights_that_ship_are_not():
    model = eit.load("digits")
    x = torch.randn(8, 3 if model.in_chans == 3 else 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not any("class token" in line for line in faults([measured(model, x)]))


def test_a_head_that_reads_no_class_token_is_not_blamed():
    one = measured(small(global_pool="avg"), images())
    assert one.analysis.class_token_share[-1] < MIN_SHARE and not one.analysis.reads_class_token
    assert not any("class token" in line for line in faults([one]))


def test_shares_are_told_with_two_digits():
    assert [percent(v) for v in (0, 0.5, 0.0123, 0.00012, 3e-7)] == ["0.0%", "50.0%", "1.2%", "0.012%", "3.0e-05%"]
