"""What sub-blocks do to frequencies: the update by the input, without stem and residual."""

import math

import pytest
import torch
import torch.nn.functional as F

import eit
from eit.analysis.frequency import shares
from eit.analysis.measure import analyze
from eit.analysis.transfer import TransferMeter


def grid(images=4, h=8, w=8, channels=6, seed=0):
    return torch.randn(images, h, w, channels, generator=torch.Generator().manual_seed(seed))


def meter_of(x, y, where="mlp", conv=0):
    meter = TransferMeter(1, where, 0.5)
    for a, b in zip(x.split(3), y.split(3), strict=True):
        meter.add("input", a, conv, 4.0)
        meter.add("update", b, conv, 4.0)
    return {transfer.where: transfer for transfer in meter.result()}


@pytest.mark.parametrize("scale", [1.0, -0.01, 50.0])
def test_a_sub_block_that_passes_its_input_on_has_gain_one(scale):
    (found,) = meter_of(grid(), scale * grid()).values()
    assert found.gain == pytest.approx(1) and [g for *_, g in found.radial()] == pytest.approx([1] * 9, rel=1e-5)


def test_a_blur_is_a_low_pass_filter_and_a_difference_a_high_pass_one():
    x = grid(images=20)
    planes = F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="circular")
    blurred = F.avg_pool2d(planes, 3, 1).permute(0, 2, 3, 1)
    (low,), (high,) = (meter_of(x, y).values() for y in (blurred, x - blurred))
    assert low.gain < 0.6 and high.gain > 1.1
    assert low.radial()[0][2] > 1 > low.radial()[-1][2] and high.radial()[0][2] < 0.5


def test_the_gain_of_two_waves_is_the_ratio_of_their_shares():
    """Energy 1 low and 1 high in; amplitudes 1/2 and 2 out: shares 1/2 and 16/17."""
    place = torch.arange(8)
    low, high = ((2 * math.pi * cycles * place / 8).cos().expand(1, 8, 8)[..., None] for cycles in (1, 3))
    (found,) = meter_of(low + high, 0.5 * low + 2 * high).values()
    assert (found.input.share, found.update.share) == pytest.approx((1 / 2, 16 / 17), abs=1e-6)
    assert found.gain == pytest.approx(32 / 17, abs=1e-5)


def test_convolved_and_attending_channels_stand_apart():
    x = grid()
    y = torch.cat((x[..., :4] - x[..., :4].roll(1, 1), x[..., 4:]), dim=3)
    found = meter_of(x, y, "mixer", conv=4)
    assert found.keys() == {"mixer", "conv", "attention"} and found["attention"].gain == pytest.approx(1)
    for part, slices in dict(mixer=slice(0, 6), conv=slice(0, 4)).items():
        expected = shares(y[..., slices])[0].mean() / shares(x[..., slices])[0].mean()
        assert found[part].gain == pytest.approx(expected.item(), rel=1e-5)
    assert found["conv"].gain > 1.05 and found["conv"].update.channels == 4
    assert meter_of(x, y, "mixer", conv=6).keys() == {"mixer", "conv"}
    assert meter_of(x, y, "mixer").keys() == {"mixer", "attention"}


def test_nothing_by_nothing_is_no_number():
    flat = torch.ones(2, 4, 4, 1)
    (neither,), (made,) = meter_of(flat, flat).values(), meter_of(flat, grid(2, 4, 4, 1)).values()
    assert math.isnan(neither.gain) and made.gain == math.inf and all(math.isnan(g) for *_, g in neither.radial())


def test_what_is_measured_is_what_the_models_sub_blocks_take_and_add():
    """By hand from the model's own modules: neither the stem nor the residual is in it."""
    torch.manual_seed(0)
    model = eit.EIT(32, 3, 1, 4, embed_dim=24, depth=3, num_heads=4, num_classes=5, schedule=(0, 12, 24)).eval()
    x = torch.randn(5, 3, 32, 32)
    found = {(t.layer, t.where): t for t in analyze(model, x, batch_size=2).transfer}
    expected = {}
    with torch.no_grad():
        tokens, h, w = model.embed(x)
        for number, block in enumerate(model.blocks, start=1):
            conv, taken = block.attn.conv_channels, block.norm1(tokens)
            mixed = block.attn(taken, h, w)
            before = block.norm2(tokens + mixed)
            sides = dict(mixer=(taken, mixed), mlp=(before, block.mlp(before)))
            if conv:
                sides["conv"] = taken[..., :conv], mixed[..., :conv]
            if conv < 24:
                sides["attention"] = taken[..., conv:], mixed[..., conv:]
            for where, pair in sides.items():
                expected[number, where] = [shares(y[:, 1:].unflatten(1, (h, w)))[0].mean().item() for y in pair]
            tokens = block(tokens, h, w)
    assert found.keys() == expected.keys()
    for key, (into, out) in expected.items():
        assert (found[key].input.share, found[key].update.share) == pytest.approx((into, out), rel=1e-4), key
        assert found[key].gain == pytest.approx(out / into, rel=1e-4)
