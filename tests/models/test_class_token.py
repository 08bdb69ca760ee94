"""`forward` computes only the class token in the last layer: with the results of computing all tokens."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import eit
from eit import EIT, complexity, load_weights
from eit.config import Loss
from eit.data.images import Preprocessing
from eit.models import ops
from eit.models.complexity import training_macs
from eit.models.registry import FAMILIES
from eit.training.loss import Distillation
from tests.helpers import reference
from tests.models.test_eit import SMALL, small


def all_tokens(model):
    """A copy whose hook, which does nothing, has it compute all tokens."""
    twin = copy.deepcopy(model)
    twin.norm.register_forward_hook(lambda *_: None)
    return twin


def outputs_and_gradients(model, x, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x)
    y.float().square().mean().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(model, x, tolerance=1e-6):
    """Logits, and gradients by their norm; no parameter is without one."""
    assert model._can_skip_tokens(x)
    (y, gradients), (expected, expected_gradients) = (outputs_and_gradients(m, x) for m in (model, all_tokens(model)))
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()
    total = torch.stack([gradient.float().norm() for gradient in expected_gradients.values()]).norm()
    for name, gradient in expected_gradients.items():
        assert gradients[name] is not None, name  # DistributedDataParallel would wait for it
        assert (gradients[name] - gradient).norm() <= tolerance * total, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "more", [{}, dict(cls_conv="mean"), dict(cls_conv="identity", qkv_bias=False), dict(schedule="increasing")], ids=str
)
def test_logits_and_gradients_are_those_of_all_tokens(family, more):
    model = small(**FAMILIES[family] | more)
    assert_same(model, torch.randn(3, 3, 32, 48))


@pytest.mark.parametrize("more", [dict(representation_size=7), dict(num_classes=0), dict(depth=1)], ids=str)
def test_heads_and_depths(more):
    model = small(**more)
    assert_same(model, torch.randn(2, 3, 32, 32))
    assert model(torch.randn(0, 3, 32, 32)).shape == (0, model.num_classes or 24)


def test_in_training_with_stochastic_depth_and_checkpointing():
    model = small(drop_path_rate=0.5).train()
    assert_same(model, torch.randn(8, 3, 32, 32))
    model.set_grad_checkpointing()
    assert_same(model, torch.randn(8, 3, 32, 32))


def test_in_data_parallel_training_from_a_teacher():
    """Every parameter has a gradient, so DistributedDataParallel need not look for unused ones."""
    model, x, y = small(), torch.randn(4, 3, 32, 32), torch.arange(4)
    view = Preprocessing(32, 32, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    distillation = Distillation(Loss(teacher="digits"), view, list("01234"), torch.device("cpu"))

    def gradients(student):
        logits = student(x)
        distillation(F.cross_entropy(logits, y), logits, x).backward()
        return [p.grad for p in student.parameters()]

    expected = gradients(all_tokens(model))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        assert model._can_skip_tokens(x)
        found = gradients(parallel)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    """As near to float32 as all tokens in half precision are."""
    model, x = small(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype):
            error, theirs = ((m(x) - exact).abs().max() for m in (model, all_tokens(model)))
        assert error < 2 * theirs + 1e-3 * exact.abs().max()
        half = model.to(dtype)(x.to(dtype))
    assert half.dtype == dtype and (half - exact).abs().max() < 0.05 * exact.abs().max()


def test_dropout_of_attention_weights(monkeypatch):
    """With the mask of the class token's row, the output is that row: the values' bias is dropped with the values."""
    torch.manual_seed(0)
    x, heads, width = torch.randn(3, 9, 12), 4, 3
    qkv = nn.Linear(12, 36)
    mask = (torch.rand(3, heads, 9) < 0.7) / 0.7
    monkeypatch.setattr(torch, "dropout", lambda weights, p, train: weights * mask if p == 0.3 and train else None)
    q, k, v = qkv(x).unflatten(2, (3, heads, width)).permute(2, 0, 3, 1, 4)
    weights = (q[:, :, :1] @ k.transpose(-2, -1) * width**-0.5).softmax(-1) * mask[:, :, None]
    expected = (weights @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ops.class_attention(x, qkv.weight, qkv.bias, heads, 0.3), expected)


def test_logits_of_the_published_architecture():
    case = next(case for case in reference.CASES if case["name"] == "eit_small_data")
    model = load_weights(EIT(**reference.our_arguments(case)), reference.published_state(case)).double().eval()
    x = reference.images(case).double()
    assert model._can_skip_tokens(x)
    with torch.no_grad():
        found = model(x)[:, :8]
    torch.testing.assert_close(found, torch.tensor(case["logits_first8"]).double(), atol=1e-6, rtol=0)


def test_compiled_and_exported_programs():
    torch.compiler.reset()
    model, x = small(), torch.randn(2, 3, 32, 32)
    expected = all_tokens(model)(x)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    assert sum("scaled_dot_product" in str(node.target) for node in program.graph.nodes) == 2  # of three layers
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    calls = [node.target for graph in graphs for node in graph.graph.nodes]
    assert sum("scaled_dot_product" in str(call) for call in calls) == 2
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)


# -- Whoever looks at the tokens sees all of them ---------------------------------------------------------------------


class Wrapped(nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return self.layer(*args)


class Subclass(EIT):
    def forward_features(self, x):
        return super().forward_features(x) * 2


def replace(owner, name, new):
    setattr(owner, name, new)


class Marked(torch.Tensor):
    """As quantised weights are."""


WATCHED = dict(
    other_weights=lambda model: replace(
        model.blocks[-1].attn.qkv, "weight", nn.Parameter(model.blocks[-1].attn.qkv.weight.data.as_subclass(Marked))
    ),
    hook_of_block=lambda model: model.blocks[-1].register_forward_hook(lambda *_: None),
    pre_hook_of_a_part=lambda model: model.blocks[-1].mlp.act.register_forward_pre_hook(lambda *_: None),
    backward_hook=lambda model: model.blocks[-1].norm1.register_full_backward_hook(lambda *_: None),
    hook_of_norm=lambda model: model.norm.register_forward_hook(lambda *_: None),
    wrapped_qkv=lambda model: replace(model.blocks[-1].attn, "qkv", Wrapped(model.blocks[-1].attn.qkv)),
    wrapped_mixer=lambda model: replace(model.blocks[-1], "attn", Wrapped(model.blocks[-1].attn)),
    wrapped_mlp=lambda model: replace(model.blocks[-1], "mlp", Wrapped(model.blocks[-1].mlp)),
    wrapped_block=lambda model: model.blocks.__setitem__(-1, Wrapped(model.blocks[-1])),
    own_forward=lambda model: replace(model.blocks[-1].mlp, "forward", lambda x: x),
    own_features=lambda model: replace(model, "forward_features", lambda x: EIT.forward_features(model, x) * 2),
    parametrized=lambda model: nn.utils.parametrizations.weight_norm(model.blocks[-1].attn.qkv),
    pooled=lambda model: model.reset_classifier(5, "avg"),
)


@pytest.mark.parametrize("watch", WATCHED.values(), ids=WATCHED)
def test_watched_or_changed_models_compute_all_tokens(watch):
    model, x = small(), torch.randn(2, 3, 32, 32)
    watch(model)
    assert not model._can_skip_tokens(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)))


def test_subclasses_and_graphs_compute_all_tokens():
    x = torch.randn(2, 3, 32, 32)
    model = Subclass(**SMALL).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward_head(EIT.forward_features(model, x) * 2))
    traced = torch.fx.symbolic_trace(small())
    assert traced(x).shape == (2, 5) and "scaled_dot_product" not in traced.code
    assert traced.code.count("_attention(") == 3


def test_features_and_intermediates_have_all_tokens():
    model, x = small(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, (last,) = model.forward_intermediates(x, [-1], norm=True, output_fmt="NLC")
        torch.testing.assert_close(tokens, model.forward_features(x))
        torch.testing.assert_close(tokens[:, 1:], last)
        torch.testing.assert_close(model.head(tokens[:, 0]), model(x))
        maps = timm.create_model("eit_mini", features_only=True, img_size=64, out_indices=[-1])(
            torch.randn(1, 3, 64, 64)
        )
    assert maps[-1].shape[1] == 250 and maps[-1].std() > 0


def test_the_cost_is_told_both_ways():
    d, heads, tokens = SMALL["embed_dim"], SMALL["num_heads"], 8 * 8
    cost = complexity(small(), (3, 32, 32))
    n = tokens + 1
    whole = n * 12 * d * d + 2 * n * n * d
    one = 12 * d * d + 2 * n * heads * d
    assert cost.macs - cost.logits_macs == whole - one
    half = complexity(small(schedule="lsra"), (3, 32, 32))
    a = d // 2
    whole, one = (4 * a * a + 8 * d * d) * n + 2 * n * n * a, 4 * a * a + 8 * d * d + 2 * n * heads * a
    assert half.macs - half.logits_macs == whole - one  # the convolution is computed both ways
    pooled = complexity(small(global_pool="avg"), (3, 32, 32))
    assert pooled.macs == pooled.logits_macs == cost.macs
    resnet = complexity(eit.create_model("timm/test_resnet"), (3, 64, 64))
    assert resnet.macs == resnet.logits_macs
    stem = 32 * 32 * d * 27
    assert training_macs(small(), (3, 32, 32)) == 3 * cost.logits_macs - stem
