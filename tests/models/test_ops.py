"""Layers give what PyTorch's own do, whatever they are computed by, and run no more operators than they must."""

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from eit.models import ops
from eit.models.eit import EIT, Block
from eit.models.ops import Linear, MaxPool2d, PatchConv2d, attention
from eit.operators import OPERATORS


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """All faster operators run, whatever the CPU."""
    monkeypatch.setattr(ops, "FASTER_ON_CPU", set(OPERATORS))


@pytest.fixture(params=[True, False], ids=["faster", "elsewhere"])
def faster(request, monkeypatch):
    monkeypatch.setattr(ops, "FASTER_ON_CPU", set(OPERATORS) if request.param else set())
    return request.param


def with_gradients(function, *tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad((output * weight).sum(), leaves)]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 7, 5), (0, 7, 5)])
@pytest.mark.parametrize("strided", [False, True])
def test_a_linear_layer(shape, strided):
    layer = Linear(5, 4)
    x = torch.randn(*shape[:-1], 9)[..., 4:] if strided else torch.randn(shape)
    actual, expected = (with_gradients(f, x, layer.weight, layer.bias) for f in (ops.linear, F.linear))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kernel, stride", [(16, 4), (4, 4), (3, 1), (7, 2), (6, 3)])
@pytest.mark.parametrize("height, width", [(33, 40), (17, 18)])
def test_a_convolution_of_patches(kernel, stride, height, width):
    layer = PatchConv2d(3, 6, kernel, stride, padding=kernel // 2)
    x = torch.randn(2, 3, height, width)
    plain = torch.nn.Conv2d(3, 6, kernel, stride, padding=kernel // 2)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-4)
    for one in (layer, plain):
        one(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height, width", [(9, 12), (11, 7)])
def test_a_max_pool(height, width, dtype):
    x = torch.randint(9, (2, 5, height, width)).to(dtype).to(memory_format=torch.channels_last)  # with ties
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        actual = with_gradients(lambda x: MaxPool2d(3)(x), x)
    for one, other in zip(actual, with_gradients(lambda x: F.max_pool2d(x, 3), x), strict=True):
        assert torch.equal(one, other)
    assert kept and x.numel() not in kept


@pytest.mark.parametrize("width", [5, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(width, dtype, monkeypatch):
    monkeypatch.setattr(ops, "CACHE", 2 * 4 * 70 * 70 * dtype.itemsize)  # three images are two pieces
    q, k, v = torch.randn(3, 3, 4, 70, width).to(dtype)
    actual = with_gradients(lambda *parts: attention(*parts, dropout=0.0), q, k, v)
    expected = with_gradients(F.scaled_dot_product_attention, *(part.float() for part in (q, k, v)))
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert (one.float() - other).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * other.norm()


def test_attention_drops_its_weights_in_training():
    """v is the identity, so the output is the weights: a quarter is 0, and the rest larger by a third."""
    tokens = 64
    q, k = torch.randn(2, 2, 3, tokens, 8, requires_grad=True)
    v = torch.eye(tokens).expand(2, 3, tokens, tokens)
    weights = F.scaled_dot_product_attention(q, k, v)
    dropped = attention(q, k, v, dropout=0.25)
    kept = dropped != 0
    assert abs(kept.float().mean() - 0.75) < 0.02
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")  # float64 is plain
def test_what_a_model_can_be_asked_for_beside_logits():
    """No images, gradients of gradients, gradients by image, a traced program: as of the plain operators."""
    model, x = small(), torch.randn(2, 3, 32, 32)
    assert model(x[:0]).shape == (0, 5)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
    weights = dict(model.named_parameters())

    def loss(weights, image):
        return torch.func.functional_call(model, weights, image[None]).square().sum()

    by_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)["patch_embed.proj.weight"]
    for image, gradient in zip(x, by_image, strict=True):
        expected = torch.autograd.grad(loss(weights, image), weights["patch_embed.proj.weight"])[0]
        torch.testing.assert_close(gradient, expected)
    pooled = MaxPool2d(2)
    assert torch.autograd.gradgradcheck(
        lambda x: pooled(x).square(), torch.randn(1, 2, 4, 4, requires_grad=True), eps=1e-2, atol=1e-2
    )


def test_exported_programs_have_the_plain_operators():
    program = torch.export.export(small().eval(), (torch.randn(2, 3, 32, 32),))
    names = Counter(node.target.__name__.split(".")[0] for node in program.graph.nodes if node.op == "call_function")
    assert names["linear"] == 3 * 4 + 1
    assert names["scaled_dot_product_attention"] == 2  # the last layer computes one token
    assert not names["pad"]


# -- A regression is seen without a clock -----------------------------------------------------------------------------


def small() -> EIT:
    return EIT(img_size=32, kernel_size=4, stride=2, pool_size=2, embed_dim=24, depth=3, num_heads=4, num_classes=5)


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


MOVES = ("clone", "copy_", "_to_copy", "cat", "constant_pad_nd", "zeros", "fill_", "zero_", "slice_backward", "stack")
PRODUCTS = ("convolution", "convolution_backward", "addmm", "mm", "bmm")


def of(names, counts):
    return {name: counts[name] for name in names if counts[name]}


def test_the_forward_pass_of_a_model_copies_only_what_it_must(faster):
    model = small().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    with Operators() as seen, torch.no_grad():
        model(x)
    # cat: the class token joins the grid once, and in each of 2 layers with a convolution, whose parts are joined too.
    # bmm: the last layer computes only the class token.
    if faster:
        assert of(PRODUCTS, seen.counts) == dict(convolution=1 + 3 * 4 - 1 + 2, addmm=2, bmm=4)
        # clone: squares of the image and of the kernel; in each layer the output of heads that were padded.
        assert of(MOVES, seen.counts) == dict(clone=2 + 2 + 1, cat=1 + 2 * 2, constant_pad_nd=1 + 2 * 3)
    else:
        assert of(PRODUCTS, seen.counts) == dict(convolution=1 + 2, addmm=11, mm=2, bmm=4)  # mm: of strided channels
        assert of(MOVES, seen.counts) == dict(clone=1, cat=1 + 2 * 2)
    assert seen.counts["_scaled_dot_product_flash_attention_for_cpu"] == 2 and seen.counts["_softmax"] == 1


def block_step(block):
    x = torch.randn(2, 17, 32, requires_grad=True)
    block(x, 4, 4).square().sum().backward()


def test_a_training_step_of_a_block_copies_only_what_it_must(faster):
    block = Block(32, 16, 1)
    with Operators() as seen:
        block_step(block)
    forward = dict(convolution=5) if faster else dict(convolution=1, addmm=3)
    backward = dict(convolution_backward=5) if faster else dict(convolution_backward=1, mm=1 + 8)
    assert of(PRODUCTS, seen.counts) == forward | backward
    # cat: class token and convolved grid, and convolution and attention, are parted and joined, each way.
    # clone, stack: the gradients of q, k and v become one.
    assert of(MOVES, seen.counts) == dict(clone=1, cat=2 + 2, stack=1)


@pytest.mark.slow
def test_a_compiled_model_takes_batches_and_sizes_of_every_kind():
    """After the second one Inductor generates code for symbols in place of numbers."""
    torch._dynamo.reset()
    model = small().to(memory_format=torch.channels_last)
    compiled = torch.compile(model)
    for batch, height, width in ((8, 16, 16), (4, 32, 32), (6, 24, 24), (5, 16, 32)):
        x = torch.randn(batch, 3, height, width).to(memory_format=torch.channels_last)
        logits = compiled(x)
        torch.testing.assert_close(logits, model(x), atol=1e-4, rtol=1e-4)
        logits.sum().backward()


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="operators are counted as torch 2.14 leaves them")
def test_a_compiled_block_is_one_graph_each_way_with_no_operators_more(faster):
    graphs = []

    def keep(graph, _):
        called = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        graphs.append(Counter(name.split(".")[1] for name in called if name.startswith("aten.")))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    block_step(torch.compile(Block(32, 16, 1), fullgraph=True, backend=aot_autograd(fw_compiler=keep)))
    assert len(graphs) == 2
    forward, backward = graphs
    assert of(PRODUCTS, forward) == dict(convolution=1, addmm=3, mm=1)
    assert of(PRODUCTS, backward) == dict(convolution_backward=1, mm=8)
    assert of(MOVES, forward) == dict(cat=2)
    assert of(MOVES, backward) == dict(clone=1, cat=2, stack=1)


# -- Heads whose width is no multiple of 8, as on a GPU ---------------------------------------------------------------


@pytest.fixture
def padding(monkeypatch):
    """Heads are padded on the CPU too, of all tokens in each layer; each time that weights are padded is noted."""
    monkeypatch.setattr(ops, "PAD_HEADS_ON", {"cpu", "meta"})
    monkeypatch.setattr(EIT, "_can_skip_tokens", lambda self, x: False)
    made, pad = [], ops.PaddedHeads._pad

    def noted(self, *weights):
        made.append(self.width)
        return pad(self, *weights)

    monkeypatch.setattr(ops.PaddedHeads, "_pad", noted)
    return made


def narrow(**arguments) -> EIT:
    """Three layers, with heads of 4, 8 and 12 channels where the family is eit."""
    shape = dict(img_size=16, kernel_size=4, stride=2, pool_size=2, embed_dim=24, depth=3, num_heads=2, num_classes=5)
    model = EIT(**shape | arguments)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # the initial values leave attention nearly uniform
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


IMAGES = torch.randn(3, 3, 16, 20, generator=torch.Generator().manual_seed(0))


def plain_way(call):
    """`call` without padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "PAD_HEADS_ON", set())
        return call()


def logits_and_gradients(model, x):
    torch.manual_seed(5)
    model.zero_grad()
    logits = model(x)
    logits.square().sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_the_same(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()


WIDTHS = (5, 10, 12, 20, 25, 8)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(
    ("schedule", "widths"),
    [
        ("eit", [5, 10, 15, 20, 25]),
        ("increasing", [25, 20, 15, 10, 5]),
        ("lsra", [12] * 5),
        ("vit", [25] * 5),
        (tuple(2 * width for width in (5, 0, 12, 20, 8)), [5, 12, 20]),
    ],
)
def test_padded_heads_are_exact(padding, schedule, widths, qkv_bias):
    model = narrow(embed_dim=50, depth=5, schedule=schedule, qkv_bias=qkv_bias).double()
    x = IMAGES.double().requires_grad_()
    actual, expected = logits_and_gradients(model, x), plain_way(lambda: logits_and_gradients(model, x))
    assert padding == widths
    assert_the_same(actual, expected, 1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_padded_heads_of_each_width_are_exact_and_a_multiple_of_8_is_not_padded(padding, width):
    model = narrow(embed_dim=2 * width, depth=1, schedule="vit").double().eval()
    with torch.no_grad():
        actual = model(IMAGES.double())
        assert padding == ([] if width == 8 else [width])
        expected = plain_way(lambda: model(IMAGES.double()))
    assert_the_same([actual], [expected], 1e-12)
    weight, _, proj = model.blocks[0].attn._padded._pad(
        *([torch.ones(6 * width, 2 * width), None]), torch.ones(2, 2 * width)
    )
    wide = -(-width // 8) * 8
    assert weight.shape == (6 * wide, 2 * width) and proj.shape == (2, 2 * wide)


def test_dropout_and_stochastic_depth_are_those_of_the_plain_way(padding):
    rates = dict(attn_drop_rate=0.3, proj_drop_rate=0.2, drop_path_rate=0.2)
    model = narrow(**rates).double().train()
    actual = logits_and_gradients(model, IMAGES.double())
    assert len(padding) == 2
    assert_the_same(actual, plain_way(lambda: logits_and_gradients(model, IMAGES.double())), 1e-12)
    assert not torch.equal(actual[0], model.eval()(IMAGES.double()))


def with_optimizer(**options):
    def change(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        model(IMAGES.to(next(model.parameters()).dtype)).square().sum().backward()
        optimizer.step()

    return change


def other_weights(model):
    return {name: value + 0.1 for name, value in model.state_dict().items()}


def each_weight(change):
    def changed(model):
        for block in model.blocks:
            for layer in (block.attn.qkv, block.attn.proj):
                change(layer)

    return changed


def replace_the_data(layer):
    layer.weight.data = layer.weight.data + 0.1


def replace_the_parameter(layer):
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 0.1)


def transpose(model):
    for block in model.blocks:
        block.attn.proj.weight = torch.nn.Parameter(block.attn.proj.weight.detach().t())  # the same memory


def change_the_bias_alone(layer):
    with torch.no_grad():
        layer.bias.add_(0.5)


def change_unseen(model):
    """As optimizers of old do, and the fused ones of torch: no version says so."""
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(1.5)


def change_unseen_between_passes_with_gradients(model):
    change_unseen(model)
    model(IMAGES).sum().backward()


def change_unseen_between_training_and_evaluation(model):
    model.train()
    change_unseen(model)
    model.eval()


CHANGES = {
    "a step of AdamW": with_optimizer(foreach=False, fused=False),
    "a step of AdamW, foreach": with_optimizer(foreach=True),
    "a step of AdamW, fused": with_optimizer(fused=True),
    "load_state_dict": lambda model: model.load_state_dict(other_weights(model)),
    "load_state_dict, assigned": lambda model: model.load_state_dict(other_weights(model), assign=True),
    "to(float64)": lambda model: model.double(),
    "weight.data =": each_weight(replace_the_data),
    "weight =": each_weight(replace_the_parameter),
    "weight = of the same memory": transpose,
    "bias in place": each_weight(change_the_bias_alone),
    "unseen, with gradients": change_unseen_between_passes_with_gradients,
    "unseen, in training": change_unseen_between_training_and_evaluation,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_padded_once_until_they_change(padding, change, mode):
    model = narrow().eval()

    def logits():
        with mode():
            return model(IMAGES.to(next(model.parameters()).dtype))

    first = logits()
    assert len(padding) == 2 and torch.equal(logits(), first) and len(padding) == 2
    CHANGES[change](model)
    padding.clear()
    second = logits()
    assert len(padding) == 2 and torch.equal(logits(), second) and len(padding) == 2
    assert not torch.allclose(second.float(), first, atol=1e-3) or change == "to(float64)"
    assert_the_same([second], [plain_way(logits)], 1e-5)


def test_padded_weights_that_are_kept_keep_no_graph_and_serve_no_training(padding):
    model = narrow().eval()
    with torch.inference_mode():
        model(IMAGES)
    kept = [tensor for block in model.blocks for tensor in (block.attn._padded._kept or (0, ()))[1]]
    assert len(kept) == 2 * 3 and not any(tensor.requires_grad or tensor.is_inference() for tensor in kept)
    actual = logits_and_gradients(model, IMAGES)
    assert len(padding) == 4  # anew, for the gradients of the model's own weights
    assert_the_same(actual, plain_way(lambda: logits_and_gradients(model, IMAGES)), 1e-4)


def test_autocast_has_padded_weights_of_its_own(padding):
    model = narrow().eval()

    def logits():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(IMAGES)

    with torch.no_grad():
        full = model(IMAGES)
    low = logits()
    assert {tensor.dtype for tensor in model.blocks[0].attn._padded._kept[1]} == {torch.bfloat16}
    padding.clear()
    assert torch.equal(logits(), low) and not padding
    assert low.dtype == torch.bfloat16 and (low.float() - full).norm() < 5e-2 * full.norm()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), full) and len(padding) == 2


def test_a_model_that_is_made_in_inference_mode_is_padded_each_time(padding):
    """Its weights have no version to know a change by."""
    with torch.inference_mode():
        model = narrow().eval()
        before = model(IMAGES)
        for block in model.blocks:
            block.attn.qkv.weight.mul_(1.5)
        after = model(IMAGES)
        assert not torch.allclose(before, after)
        assert_the_same([after], [plain_way(lambda: model(IMAGES))], 1e-5)


@pytest.mark.parametrize("layer", ["qkv", "proj"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_a_layer_are_called(padding, layer, register):
    model, called = narrow(), []
    getattr(model.blocks[0].attn.get_submodule(layer), register)(lambda *_: called.append(layer))
    model(IMAGES).sum().backward()
    assert called == [layer] and padding == [12]  # the other layer has none


def test_a_layer_that_is_replaced_is_called(padding):
    """By one of LoRA, or one with a parametrization, say."""
    model = narrow().eval()

    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    attention = model.blocks[0].attn
    doubled = Doubled(4 * 2, 3 * 4 * 2)
    doubled.load_state_dict(attention.qkv.state_dict())
    attention.qkv = doubled
    torch.nn.utils.parametrize.register_parametrization(model.blocks[2].attn.proj, "weight", torch.nn.Tanh())
    with torch.no_grad():
        assert_the_same([model(IMAGES)], [plain_way(lambda: model(IMAGES))], 1e-5)
    assert not padding


def test_programs_have_the_plain_operators(padding):
    model = narrow().eval()
    with torch.no_grad():
        expected = plain_way(lambda: model(IMAGES))
        programs = [
            torch.jit.script(model),
            torch.jit.trace(model, IMAGES, check_trace=False),
            torch.fx.symbolic_trace(model),
            torch.export.export(model, (IMAGES,)).module(),
        ]
        assert not padding
        for program in programs:
            torch.testing.assert_close(program(IMAGES), expected, atol=1e-4, rtol=1e-4)
    assert not padding


def test_a_compiled_model_is_one_graph_and_pads_in_it(padding):
    torch._dynamo.reset()
    model = narrow(depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_the_same(
        logits_and_gradients(compiled, IMAGES), plain_way(lambda: logits_and_gradients(model, IMAGES)), 1e-4
    )
    with torch.no_grad():
        before = compiled(IMAGES)
        model.blocks[0].attn.qkv.weight.mul_(1.5)
        assert not torch.allclose(compiled(IMAGES), before, atol=1e-3)  # nothing is kept
        assert_the_same([compiled(IMAGES)], [plain_way(lambda: model(IMAGES))], 1e-5)


def test_copies_share_nothing_and_files_hold_nothing_of_it(padding, tmp_path):
    model = narrow().eval()
    names, size = list(model.state_dict()), len(pickle.dumps(model))
    with torch.no_grad():
        expected = model(IMAGES)
        assert list(model.state_dict()) == names and not [name for name in names if "padded" in name]
        assert len(pickle.dumps(model)) == size
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
            assert torch.equal(twin(IMAGES), expected)
        twin = copy.deepcopy(model)
        for block in twin.blocks:
            block.attn.qkv.weight.mul_(1.5)
        padding.clear()
        assert not torch.allclose(twin(IMAGES), expected) and torch.equal(model(IMAGES), expected)
        assert len(padding) == 2  # of the copy alone


def test_gradients_by_image_are_those_of_the_plain_way(padding):
    model = narrow().double()
    weights = dict(model.named_parameters())

    def loss(weights, image):
        return torch.func.functional_call(model, weights, image[None]).square().sum()

    def by_image():
        return list(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, IMAGES.double()).values())

    actual = by_image()
    assert len(padding) == 2
    assert_the_same(actual, plain_way(by_image), 1e-12)


def test_an_ensemble_by_vmap_is_that_of_the_plain_way(padding):
    model = narrow().double().eval()
    weights, buffers = torch.func.stack_module_state([narrow().double().eval(), model])

    def logits(weights):
        return torch.func.functional_call(model, (weights, buffers), IMAGES.double())

    with torch.no_grad():
        weights["blocks.0.attn.qkv.weight"][0].mul_(1.5)
        for _ in range(2):
            actual = torch.func.vmap(logits)(weights)
            assert_the_same([actual], [plain_way(lambda: torch.func.vmap(logits)(weights))], 1e-12)
        assert_the_same([actual[1]], [model(IMAGES.double())], 1e-12)


class Padded(TorchDispatchMode):
    """Notes the shape of each tensor that is padded, and the other operators by number."""

    def __init__(self):
        super().__init__()
        self.shapes, self.others = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ == "constant_pad_nd":
            self.shapes.append(tuple(args[0].shape))
        else:
            self.others += 1
        return function(*args, **(kwargs or {}))


def test_no_padding_costs_anything_by_token_and_none_is_left_in_evaluation(padding, monkeypatch):
    monkeypatch.setattr(ops, "FASTER_ON_CPU", set())
    with Padded() as training:
        narrow(device="meta")(torch.empty(7, 3, 16, 20, device="meta")).sum().backward()
    assert len(training.shapes) == 2 * 3 * 2  # weight and bias of qkv, weight of proj; their gradients; in two layers
    assert not [shape for shape in training.shapes if 7 in shape or 1 + 4 * 5 in shape]
    model = narrow().eval()
    with torch.no_grad():
        model(IMAGES)
        with Padded() as evaluation:
            model(IMAGES)
        with Padded() as plain:
            plain_way(lambda: model(IMAGES))
    assert not evaluation.shapes and evaluation.others <= plain.others
