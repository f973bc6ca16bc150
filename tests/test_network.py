"""Networks in resident layout (csrc/network.h) against torch's modules in float64."""

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery import _ext
from sparselottery.masks import Mask


@pytest.fixture(params=_ext.extension().cpu_isas())
def isa(request):
    _ext.extension().cpu_set_isa(request.param)
    yield request.param
    _ext.extension().cpu_set_isa("auto")


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def describe(model):
    """(layer descriptions, what they point to)."""
    layers, keep = [], []

    def address(tensor):
        return 0 if tensor is None else tensor.data_ptr()

    def words(module):
        if not hasattr(module, "weight_mask"):
            return 0
        keep.append(module.weight_mask.contiguous())
        return keep[-1].data_ptr()

    for m in model:
        if isinstance(m, nn.Linear):
            layer = {"kind": "linear", "outputs": m.out_features, "weight": address(m.weight), "bias": address(m.bias)}
            layers.append(layer | {"words": words(m)})
        elif isinstance(m, nn.Conv2d):
            layer = {"kind": "conv2d", "outputs": m.out_channels, "weight": address(m.weight), "bias": address(m.bias)}
            shape = {"kernel": m.kernel_size, "stride": m.stride, "padding": m.padding, "dilation": m.dilation}
            layers.append(layer | shape | {"groups": m.groups, "words": words(m)})
        elif isinstance(m, nn.MaxPool2d | nn.AvgPool2d):
            kind = "max_pool2d" if isinstance(m, nn.MaxPool2d) else "avg_pool2d"
            layer = {"kernel": pair(m.kernel_size), "stride": pair(m.stride), "padding": pair(m.padding)}
            layers.append({"kind": kind, "count_include_pad": getattr(m, "count_include_pad", True)} | layer)
        elif isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            layer = {"kind": "batch_norm", "weight": address(m.weight), "bias": address(m.bias)}
            layer |= {"mean": address(m.running_mean), "variance": address(m.running_var)}
            layers.append(layer | {"momentum": m.momentum, "eps": m.eps})
        else:
            layers.append({"kind": {nn.ReLU: "relu", nn.Flatten: "flatten"}[type(m)]})
    return layers, keep


def make(model, shape, linear_densest=0.5, conv_densest=0.5, **options):
    layers, keep = describe(model)
    shape = (*shape, 1, 1)[:3]
    network = _ext.extension().CpuNetwork(
        shape, layers, linear_densest=linear_densest, conv_densest=conv_densest, **options
    )
    assert keep is not None
    return network


def nan_like(shape):
    return torch.full(tuple(shape), float("nan"))


def forward(network, x, shape):
    y = nan_like((len(x), *shape))
    network.forward(x.data_ptr(), x[0].numel(), len(x), y.data_ptr())
    return y


def gradients_of(network, model, x, grad, training=True, wants_dx=True):
    """(y, dx, gradients by parameter name) through record and backward."""
    y, dx = nan_like(grad.shape), nan_like(x.shape)
    tape = network.record(x.data_ptr(), x[0].numel(), len(x), training, y.data_ptr())
    found, targets = {}, []
    for name, m in model.named_children():
        weight, bias = getattr(m, "weight", None), getattr(m, "bias", None)
        for kind, p in (("weight", weight), ("bias", bias)):
            if p is not None:
                found[f"{name}.{kind}"] = nan_like(p.shape)
        addresses = [
            found[f"{name}.{kind}"].data_ptr() if p is not None else 0
            for kind, p in (("weight", weight), ("bias", bias))
        ]
        targets.append((*addresses, 0, 0))
    network.backward(tape, grad.data_ptr(), dx.data_ptr() if wants_dx else 0, targets)
    return y, dx, found


def mask_for(shape, density, generator):
    if density == "one":
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[torch.randint(mask.numel(), (1,), generator=generator)] = True
    elif density == "holes":  # an empty row, an empty column
        mask = torch.rand(shape, generator=generator) < 0.4
        mask[len(mask) // 2] = False
        mask[:, mask.shape[1] // 2] = False
    else:
        mask = torch.rand(shape, generator=generator) < density
    return mask


def build(modules, density, seed=0):
    """A model whose linear and convolutional layers are masked at `density` (None: plain), with weights of any kind."""
    torch.manual_seed(seed)
    model = nn.Sequential(*modules)
    generator = torch.Generator().manual_seed(seed)
    for m in model:
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, -1, 2)
                nn.init.normal_(m.bias)
    if density is not None:
        model = sl.sparsify(model)
        for m in model:
            if hasattr(m, "set_mask"):
                m.set_mask(Mask.from_dense(mask_for(m.weight.shape, density, generator)))
    return model


def check(model, shape, batch, seed=0, training=True, tolerance=2e-5, **options):
    """Forward in both modes and all gradients, against float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *shape, generator=g)
    exact = nn.Sequential(*[plain(m) for m in model]).double()
    exact.eval()
    expected = exact(x.double())
    network = make(model, shape, **options)
    assert network.output_shape() == (*expected.shape[1:], 1, 1)[:3]
    close(forward(network, x, expected.shape[1:]), expected, tolerance)
    exact.train(training)
    inputs = x.double().requires_grad_()
    expected = exact(inputs)
    grad = torch.randn(expected.shape, generator=g)
    expected.backward(grad.double())
    for wants_dx in (False, True):
        before = model.state_dict()
        network = make(model, shape, **options)
        y, dx, found = gradients_of(network, model, x, grad, training, wants_dx)
        close(y, expected.detach(), tolerance)
        if wants_dx:
            close(dx, inputs.grad, tolerance)
        else:
            assert dx.isnan().all()
        largest = max((p.grad.abs().max().item() for p in exact.parameters()), default=0.0)
        for name, p in exact.named_parameters():
            wanted = p.grad
            words = before.get(f"{name}_mask")
            if words is not None:
                dead = ~Mask(words, p.shape).to_dense()
                wanted = wanted.masked_fill(dead, 0)
                assert (found[name][dead] == 0).all(), name
            close(found[name], wanted, tolerance, name, 0.1 * largest)  # a bias before a normalization has none
    return network, exact


def plain(module):
    """A fresh torch module of the same values."""
    import copy

    module = copy.deepcopy(module)
    return sl.densify(module) if hasattr(module, "set_mask") else module


def close(ours, expected, tolerance, name="", smallest=1e-3):
    assert ours.isfinite().all(), name
    scale = max(expected.abs().max().item(), smallest) if expected.numel() else 1.0
    error = (ours.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale, f"{name}: {error} of {scale}"


CONVS = {
    "3x3": dict(kernel_size=3, padding=1),
    "valid": dict(kernel_size=3),
    "wide padding": dict(kernel_size=3, padding=3),
    "stride 2": dict(kernel_size=3, padding=1, stride=2),
    "stride 3": dict(kernel_size=2, stride=3),
    "stride 2, 1x1": dict(kernel_size=1, stride=2),
    "5x3": dict(kernel_size=(5, 3), padding=(2, 0), stride=(1, 2)),
    "dilated": dict(kernel_size=3, padding=2, dilation=2),
    "dilated, stride 2": dict(kernel_size=3, padding=(1, 3), dilation=(2, 3), stride=2),
    "groups": dict(kernel_size=3, padding=1, groups=2),
    "groups, stride 2": dict(kernel_size=3, padding=1, groups=2, stride=2),
}


@pytest.mark.parametrize("density", [None, 0.3, 0.0, 1.0, "one", "holes"])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions(isa, name, density):
    options = dict(CONVS[name])
    torch.manual_seed(1)
    model = build([nn.Conv2d(4, 6, **options)], density)
    for densest in (0.0, 1.0):  # as a dense matrix and as survivors
        check(model, (4, 9, 11), 5, conv_densest=densest)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 9, 13, 17, 32])
@pytest.mark.parametrize("stride", [1, 2])
def test_images_of_any_width(width, stride):
    model = build([nn.Conv2d(3, 5, 3, padding=1, stride=stride), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1)], 0.4)
    for densest in (0.0, 1.0):
        check(model, (3, 5, width), 19, conv_densest=densest)


@pytest.mark.parametrize("batch", [1, 3, 15, 16, 17, 64, 65, 130])
def test_batches_of_any_size(isa, batch):
    modules = [
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 6, 9),
        nn.ReLU(),
        nn.Linear(9, 3),
    ]
    check(build(modules, 0.3), (2, 8, 10), batch)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [9, 33, 70])
def test_batch_norm(isa, batch, training):
    modules = [
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, stride=2),
        nn.BatchNorm2d(6, momentum=0.3, eps=1e-3),
        nn.AvgPool2d(3),
        nn.ReLU(),
        nn.BatchNorm2d(6, affine=False),
        nn.Flatten(),
        nn.Linear(6 * 2, 7),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 4),
    ]
    model = build(modules, 0.6)
    for densest in (0.0, 1.0):
        network, exact = check(
            model, (2, 7, 12), batch, training=training, conv_densest=densest, linear_densest=densest, tolerance=1e-4
        )
        for i, m in enumerate(exact):
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                mean, variance = nan_like(m.running_mean.shape), nan_like(m.running_var.shape)
                network.store(i, (0, 0, mean.data_ptr(), variance.data_ptr()))
                close(mean, m.running_mean, 1e-5)
                close(variance, m.running_var, 1e-5)


POOLS = {
    "max 2": nn.MaxPool2d(2),
    "max 3, stride 2, padding 1": nn.MaxPool2d(3, 2, 1),
    "max (1, 3), gaps": nn.MaxPool2d((1, 3), (2, 4)),
    "avg 2": nn.AvgPool2d(2),
    "avg 3, stride 1, padding 1": nn.AvgPool2d(3, 1, 1),
    "avg without padding": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "global": nn.AvgPool2d((8, 9)),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("after", ["relu", "flatten", "conv"])
def test_pooling(isa, name, after):
    modules = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), POOLS[name]]
    modules += {"relu": [nn.ReLU()], "flatten": [nn.Flatten()], "conv": [nn.Conv2d(4, 3, 1)]}[after]
    check(build(modules, 0.5), (2, 8, 9), 18)


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((3, 2), 1), nn.MaxPool2d(2, 3)], ids=str
)
@pytest.mark.parametrize("relu", [False, True])
def test_max_pooling_of_ties_and_special_values(isa, pool, relu):
    """To the bit as torch, whose gradient goes to the first of equals and to the last NaN of a window."""
    g = torch.Generator().manual_seed(0)
    choice = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, 1.0, -1.0])
    x = choice[torch.randint(len(choice), (37, 3, 8, 9), generator=g)]
    x[:4], x[4:8], x[8:12] = torch.nan, -torch.inf, 1.0
    x[12:24] = torch.where(
        torch.rand(12, 3, 8, 9, generator=g) < 0.05, torch.nan, torch.randn(12, 3, 8, 9, generator=g)
    )
    model, inputs = nn.Sequential(pool, *[nn.ReLU()] * relu), x.clone().requires_grad_()
    expected = model(inputs)
    grad = torch.randn(expected.shape, generator=g)
    expected.backward(grad)
    y, dx, _ = gradients_of(make(model, (3, 8, 9)), model, x, grad)
    assert torch.equal(y.nan_to_num(123), expected.detach().nan_to_num(123))
    torch.testing.assert_close(dx, inputs.grad, rtol=1e-6, atol=1e-6)  # a pixel of several windows gets a sum
    assert torch.equal(dx != 0, inputs.grad != 0)


@pytest.mark.parametrize(
    "modules, shape",
    [
        ([nn.ReLU()], (2, 3, 4)),
        ([nn.ReLU(), nn.Conv2d(2, 3, 2)], (2, 3, 4)),
        ([nn.Flatten()], (2, 3, 4)),
        ([nn.MaxPool2d(2)], (2, 4, 4)),
        ([nn.BatchNorm2d(2)], (2, 3, 4)),
        ([nn.Conv2d(2, 3, 3), nn.Flatten(), nn.BatchNorm1d(3)], (2, 3, 3)),
        ([nn.Conv2d(2, 3, 2), nn.Flatten(), nn.BatchNorm1d(18)], (2, 3, 4)),
        ([nn.Conv2d(2, 3, 2), nn.Flatten()], (2, 3, 4)),
        ([nn.Flatten(), nn.Linear(24, 5)], (2, 3, 4)),
        ([nn.Linear(24, 5), nn.ReLU()], (24,)),
        ([nn.BatchNorm1d(24), nn.Linear(24, 5)], (24,)),
    ],
    ids=lambda v: "-".join(type(m).__name__ for m in v) if isinstance(v, list) else None,
)
def test_short_networks(isa, modules, shape):
    check(build(modules, 0.5), shape, 21)


def test_new_values_and_a_second_tape():
    """Tapes are apart: the first one's gradients are those of its own examples, after a second forward pass."""
    model = build([nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)], 0.4)
    network = make(model, (2, 4, 5))
    with torch.no_grad():
        for m in model:
            if hasattr(m, "mask"):
                m.weight.mul_(-2)
                m.bias.add_(1)
    for i, m in enumerate(model):
        if hasattr(m, "mask"):
            network.load(i, (m.weight.data_ptr(), m.bias.data_ptr(), 0, 0))
    xs, tapes = [torch.randn(n, 2, 4, 5) for n in (33, 5)], []
    for x in xs:
        y = nan_like((len(x), 3))
        tapes.append(network.record(x.data_ptr(), 40, len(x), True, y.data_ptr()))
        close(y, model(x).detach().double(), 2e-5)
    for x, tape in zip(xs, tapes, strict=True):
        dw = nan_like(model[3].weight.shape)
        ones = torch.ones(len(x), 3)
        targets = [(0, 0, 0, 0)] * 3 + [(dw.data_ptr(), 0, 0, 0)]
        network.backward(tape, ones.data_ptr(), 0, targets)
        model.zero_grad()
        model(x).sum().backward()
        close(dw, model[3].weight.grad.double(), 2e-5)
    del network
    del tapes


def test_same_bits_for_any_number_of_threads():
    modules = [
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 64, 700),
        nn.ReLU(),
        nn.Linear(700, 5),
    ]
    model = build(modules, 0.3)
    x, grad = torch.randn(150, 16, 16, 16), torch.randn(150, 5)
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            y, dx, found = gradients_of(make(model, (16, 16, 16)), model, x, grad)
            outcomes.append([y, dx, *found.values(), forward(make(model, (16, 16, 16)), x, (5,))])
        finally:
            torch.set_num_threads(1)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_what_does_not_fit_is_named():
    def fails(match, modules, shape, **changes):
        layers, keep = describe(nn.Sequential(*modules))
        layers[-1] |= changes
        with pytest.raises(ValueError, match=match):
            _ext.extension().CpuNetwork(shape, layers, linear_densest=0.5, conv_densest=0.5)
        assert not keep

    fails(r"layers\[1\]: conv2d: expected images", [nn.Flatten(), nn.Conv2d(2, 2, 1)], (2, 3, 3))
    fails(r"layers\[0\]: conv2d: expected a filter that fits", [nn.Conv2d(2, 2, 4)], (2, 3, 3))
    fails(r"layers\[0\]: conv2d: expected a filter that fits", [nn.Conv2d(2, 2, 3)], (2, 3, 3), stride=(0, 1))
    fails(r"layers\[0\]: groups: expected a divisor", [nn.Conv2d(2, 2, 1)], (2, 3, 3), groups=3)
    fails(r"layers\[0\]: linear: expected a flatten", [nn.Linear(3, 3)], (2, 3, 3))
    fails(r"layers\[0\]: pooling: expected windows that fit", [nn.MaxPool2d(4)], (2, 3, 3))
    fails(r"layers\[1\]: pooling: expected images", [nn.Flatten(), nn.MaxPool2d(1)], (2, 3, 3))
    fails("input: expected sizes of at least 1", [nn.ReLU()], (0, 3, 3))
    fails("unknown layer gelu", [nn.ReLU()], (2, 3, 3), kind="gelu")
    fails("unknown field color", [nn.ReLU()], (2, 3, 3), color=1)
    network = make(nn.Sequential(nn.Conv2d(2, 3, 2)), (2, 3, 4))
    with pytest.raises(ValueError, match="outputs that are classes"):
        network.evaluate(0, 24, 0, 1)
    with pytest.raises(ValueError, match="one that trains"):
        network.train(0, 24, 0, 0, 1, [0.1])


def test_a_tape_of_another_network_is_refused():
    model = build([nn.Linear(3, 2)], None)
    x, y = torch.randn(4, 3), torch.empty(4, 2)
    ours, other = make(model, (3,)), make(model, (3,))
    tape = ours.record(x.data_ptr(), 3, 4, True, y.data_ptr())
    with pytest.raises(ValueError, match="tape: expected one of this network"):
        other.backward(tape, y.data_ptr(), 0, [(0, 0, 0, 0)])
    with pytest.raises(ValueError, match="targets: expected one for each layer"):
        ours.backward(tape, y.data_ptr(), 0, [])
