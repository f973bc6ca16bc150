"""masked_sgd_ and masked_adam_: parity with torch.optim and the reference, dead weights, strides, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselottery import _ext
from sparselottery.ops import masked_optim, reference

SHAPES = [(40, 33), (7,), (), (64, 64), (8, 3, 3, 3), (3, 4100), (0, 5), (5, 1)]
SGD = {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "nesterov": False, "maximize": False}
ADAM = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "decoupled": False,
    "maximize": False,
}


def sample(shapes, density, dtype, seed=0, with_none=True):
    """Parameters, bool masks and words (None for every third parameter)."""
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    keep = [torch.rand(s, generator=g) < density for s in shapes]
    if with_none:
        keep = [torch.ones_like(k) if i % 3 == 2 else k for i, k in enumerate(keep)]
    words = [None if with_none and i % 3 == 2 else reference.bitmask_pack(k) for i, k in enumerate(keep)]
    return params, keep, words


def gradients(shapes, step, dtype, keep=None):
    g = torch.Generator().manual_seed(1000 + step)
    grads = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    return grads if keep is None else [torch.where(k, x, math.nan) for x, k in zip(grads, keep, strict=True)]


def state_of(params, count, fill=0.0):
    return [[torch.full_like(p, fill) for p in params] for _ in range(count)]


def run_adam(shapes, density, dtype, steps, amsgrad=False, **options):
    """Survivors, masks and state after some steps whose dead gradients are NaN."""
    params, keep, words = sample(shapes, density, dtype)
    state = state_of(params, 3 if amsgrad else 2)
    for step in range(1, steps + 1):
        lists = (params, gradients(shapes, step, dtype, keep), *state[:2], state[2] if amsgrad else [], words)
        masked_optim.masked_adam_(*lists, step=step, clean=step > 1, **(ADAM | options))
    return params, keep, state


def run_torch(cls, shapes, density, dtype, steps, **options):
    params, keep, _ = sample(shapes, density, dtype)
    params = [torch.nn.Parameter(torch.where(k, p, 0)) for p, k in zip(params, keep, strict=True)]
    optimizer = cls(params, **options)
    for step in range(1, steps + 1):
        for p, g, k in zip(params, gradients(shapes, step, dtype), keep, strict=True):
            p.grad = torch.where(k, g, 0)
        optimizer.step()
    return params


def assert_same(got, want, keep, tolerance):
    for a, b, k in zip(got, want, keep, strict=True):
        assert (a[~k] == 0).all()
        torch.testing.assert_close(a[k], b.detach()[k], rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    """Each variant of the C++ code. One that this CPU lacks is replaced by the best it has: the test still asserts."""
    extension = _ext.extension()
    extension.cpu_set_isa(request.param if request.param in extension.cpu_isas() else "auto")
    yield request.param
    extension.cpu_set_isa("auto")


@pytest.mark.parametrize("density", [0.0, 0.03, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_adam_is_torchs_over_100_steps(isa, density, dtype, tolerance):
    got, keep, _ = run_adam(SHAPES, density, dtype, 100)
    want = run_torch(torch.optim.Adam, SHAPES, density, dtype, 100, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    assert_same(got, want, keep, tolerance)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_variants_are_torchs(amsgrad, decoupled, maximize, weight_decay):
    variant = {"maximize": maximize, "weight_decay": weight_decay}
    got, keep, state = run_adam(SHAPES, 0.3, torch.float64, 12, amsgrad=amsgrad, decoupled=decoupled, **variant)
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    want = run_torch(cls, SHAPES, 0.3, torch.float64, 12, lr=0.01, betas=(0.9, 0.99), amsgrad=amsgrad, **variant)
    assert_same(got, want, keep, 1e-12)
    for tensors in state:
        assert all((t[~k] == 0).all() for t, k in zip(tensors, keep, strict=True))


@pytest.mark.parametrize("density", [0.0, 0.03, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01, "maximize": True},
    ],
)
def test_sgd_is_torchs_over_100_steps(isa, density, options):
    params, keep, words = sample(SHAPES, density, torch.float64)
    (buffers,) = state_of(params, 1, math.nan)  # `first` must ignore what lies in them
    for step in range(1, 101):
        grads = gradients(SHAPES, step, torch.float64, keep)
        options_now = {"lr": 0.05} | options | {"first": step == 1, "clean": step > 1}
        masked_optim.masked_sgd_(params, grads, buffers, words, **options_now)
    want = run_torch(torch.optim.SGD, SHAPES, density, torch.float64, 100, lr=0.05, **options)
    assert_same(params, want, keep, 1e-12)
    if "momentum" in options:
        assert all((b[~k] == 0).all() for b, k in zip(buffers, keep, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 70), min_size=0, max_size=3),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.24, 0.26, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    clean=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_the_reference(shape, density, dtype, clean, seed):
    (param,), (keep,), (words,) = sample([tuple(shape)], density, dtype, seed, with_none=False)
    grad = gradients([tuple(shape)], seed, dtype)[0]
    # Not near 0: the weight's step is divided by the second moment's root, which bfloat16 rounds.
    first, second = torch.randn_like(param), torch.rand_like(param) + 0.1
    if clean:
        param, first, second = (torch.where(keep, t, 0) for t in (param, first, second))
    else:
        param = torch.where(keep, param, math.nan)
    wanted = [t.double() for t in (param, first, second)]
    reference.masked_adam_(wanted[0], grad.double(), *wanted[1:], None, words, step=3.0, **ADAM)
    masked_optim.masked_adam_([param], [grad], [first], [second], [], [words], step=3, clean=clean, **ADAM)
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
    for got, want in zip((param, first, second), wanted, strict=True):
        assert (got[~keep] == 0).all()
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("density", [0.03, 0.6])
def test_any_number_of_threads_gives_the_same_bits(density):
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_adam([(400, 500), (300,)], density, torch.float32, 3)[0])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_neighbours_do_not_matter():
    """A survivor's result has the same bits whether the weights around it live or not."""
    g = torch.Generator().manual_seed(0)
    param, grad = torch.randn(2048, generator=g), torch.randn(2048, generator=g)
    few = torch.zeros(2048, dtype=torch.bool)
    few[::37] = True
    many = few | (torch.arange(2048) % 2 == 0)
    results = []
    for keep in (few, many):
        p, m, v = param.clone(), torch.zeros(2048), torch.zeros(2048)
        masked_optim.masked_adam_([p], [grad], [m], [v], [], [reference.bitmask_pack(keep)], step=1, **ADAM)
        results.append(p[few])
    assert torch.equal(*results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_survivors_nan_behaves_as_in_torch_and_stays_where_it_is(bad):
    params, keep, words = sample([(9, 40)], 0.4, torch.float32)
    grads = gradients([(9, 40)], 1, torch.float32)
    hit = keep[0].nonzero()[3]
    grads[0][tuple(hit)] = bad
    grads[0][~keep[0]] = bad
    m, v = state_of(params, 2)
    want = torch.nn.Parameter(torch.where(keep[0], params[0], 0))
    want.grad = torch.where(keep[0], grads[0], 0)
    torch.optim.Adam([want], lr=0.01, betas=(0.9, 0.99)).step()
    masked_optim.masked_adam_(params, grads, m, v, [], words, step=1, **(ADAM | {"weight_decay": 0.0}))
    torch.testing.assert_close(params[0], want.detach(), equal_nan=True, rtol=1e-5, atol=1e-6)
    assert int((~params[0].isfinite()).sum()) == 1 and (params[0][~keep[0]] == 0).all()


def test_an_infinite_weight_without_decay_stays_infinite():
    """0 * inf is NaN: a weight decay of 0 must not multiply at all."""
    p, g = torch.tensor([math.inf, 1.0]), torch.ones(2)
    masked_optim.masked_sgd_([p], [g], [], [None], lr=0.5)
    assert p.tolist() == [math.inf, 0.5]


def test_clean_leaves_dead_memory_alone_and_its_absence_writes_zeros():
    param, grad = torch.full((4, 64), 5.0), torch.ones(4, 64)
    words = torch.tensor([[1, 0], [0, 0], [-1, -1], [0, 0]], dtype=torch.int32)
    masked_optim.masked_sgd_([param], [grad], [], [words], lr=1.0, clean=True)
    assert param[0, 0] == 4 and (param[2] == 4).all() and (param[1] == 5).all() and (param[3] == 5).all()
    masked_optim.masked_sgd_([param], [grad], [], [words], lr=1.0)
    assert param[0, 0] == 3 and (param[0, 1:] == 0).all() and (param[2] == 3).all()
    assert (param[1] == 0).all() and (param[3] == 0).all()


def strided(tensor, how):
    if how == "channels_last":
        return tensor.to(memory_format=torch.channels_last)
    if how == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan, dtype=tensor.dtype)
    padded[..., 1:-2] = tensor
    return padded[..., 1:-2]


@pytest.mark.parametrize("how", ["channels_last", "transposed", "offset"])
@pytest.mark.parametrize("which", ["params", "grads", "state", "words"])
def test_strides_do_not_matter(how, which):
    shape = (6, 5, 3, 7)
    params, _, words = sample([shape], 0.4, torch.float32, with_none=False)
    grads = gradients([shape], 1, torch.float32)
    m, v = state_of(params, 2)
    want = [t.double() for t in (params[0], m[0], v[0])]
    reference.masked_adam_(want[0], grads[0].double(), want[1], want[2], None, words[0], step=1, **ADAM)
    if which == "params":
        params = [strided(params[0], how)]
    elif which == "grads":
        grads = [strided(grads[0], how)]
    elif which == "state":
        m, v = [strided(m[0], how)], [strided(v[0], how)]
    else:
        words = [words[0].t().contiguous().t()]
    stride = params[0].stride()
    masked_optim.masked_adam_(params, grads, m, v, [], words, step=1, **ADAM)
    assert params[0].stride() == stride
    for got, wanted in zip((params[0], m[0], v[0]), want, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_steps_and_flags_may_differ_between_tensors():
    params, _, words = sample([(20, 40)] * 2, 0.5, torch.float64, with_none=False)
    grads = gradients([(20, 40)] * 2, 1, torch.float64)
    wanted = [p.clone() for p in params]
    m, v = state_of(params, 2)
    m2, v2 = state_of(params, 2)
    for i, step in enumerate((1, 50)):
        reference.masked_adam_(wanted[i], grads[i], m2[i], v2[i], None, words[i], step=step, **ADAM)
    masked_optim.masked_adam_(params, grads, m, v, [], words, step=[1, 50], **ADAM)
    for got, want in zip(params, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_autograd_notices_the_update():
    w = torch.ones(3, requires_grad=True)
    y = (w * w).sum()
    with torch.no_grad():
        masked_optim.masked_sgd_([w], [torch.ones(3)], [], [None], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_opcheck():
    params, _, words = sample([(6, 40), (5,)], 0.4, torch.float32)
    grads = gradients([(6, 40), (5,)], 1, torch.float32)
    m, v = state_of(params, 2)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    adam = (params, grads, m, v, [], words, [1.0, 1.0], 0.1, 0.9, 0.99, 1e-8, 0.1, True, False, [False, False])
    torch.library.opcheck(torch.ops.sparselottery.masked_adam_, adam, test_utils=utils)
    sgd = (params, grads, m, words, 0.1, 0.9, 0.0, 0.1, False, False, [False, False], [False, False])
    torch.library.opcheck(torch.ops.sparselottery.masked_sgd_, sgd, test_utils=utils)


def test_a_backend_may_be_forced(monkeypatch):
    p = torch.zeros(3)
    assert masked_optim.backend_of(p) == "cpu"
    assert masked_optim.backend_of(p.bfloat16()) == "reference"
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "reference")
    assert masked_optim.backend_of(p) == "reference"


ONE = torch.ones(6, 9)


@pytest.mark.parametrize(
    "change, error, says",
    [
        (
            {"params": [torch.ones(6, 9, dtype=torch.int64)]},
            TypeError,
            r"params\[0\]: expected a dense floating-point tensor",
        ),
        ({"params": [ONE.to_sparse()]}, TypeError, r"params\[0\]: expected a dense .* \(torch.sparse_coo\)"),
        ({"params": None}, TypeError, "params: expected a list of tensors, got NoneType"),
        ({"grads": None}, TypeError, "grads: expected a list of tensors, got NoneType"),
        ({"exp_avg_sqs": ONE}, TypeError, "exp_avg_sqs: expected a list of tensors, got Tensor"),
        ({"words": 3}, TypeError, "words: expected a list of tensors, got int"),
        ({"grads": []}, ValueError, "grads: expected 1 tensors like params, got 0"),
        (
            {"grads": [torch.ones(6, 8)]},
            ValueError,
            r"grads\[0\]: expected \[6, 9\] on cpu like params\[0\], got \[6, 8\]",
        ),
        ({"grads": [ONE.double()]}, TypeError, r"grads\[0\]: expected a dense torch.float32"),
        ({"grads": [ONE.to_sparse()]}, TypeError, r"grads\[0\]: expected a dense torch.float32"),
        ({"exp_avgs": [None]}, TypeError, r"exp_avgs\[0\]: expected a dense torch.float32 tensor .* got NoneType"),
        ({"max_exp_avg_sqs": [ONE[:5]]}, ValueError, r"max_exp_avg_sqs\[0\]: expected \[6, 9\]"),
        ({"words": []}, ValueError, "words: expected 1 entries like params, got 0"),
        ({"words": [torch.ones(6, 2, dtype=torch.int32)]}, ValueError, r"words\[0\]: expected int32 \[6, 1\] on cpu"),
        ({"words": [torch.ones(6, 1)]}, ValueError, r"words\[0\]: expected int32 \[6, 1\]"),
        ({"step": 0}, ValueError, "step: expected numbers from 1, got 0"),
        ({"step": [1, 2]}, ValueError, "step: expected 1 entries like params, got 2"),
        ({"clean": [True, False]}, ValueError, "clean: expected 1 entries like params, got 2"),
    ],
)
def test_bad_input_names_the_argument(change, error, says):
    lists = {"params": [ONE], "grads": [ONE], "exp_avgs": [ONE], "exp_avg_sqs": [ONE], "max_exp_avg_sqs": []}
    arguments = lists | {"words": [None], "step": 1, "lr": 0.1} | change
    with pytest.raises(error, match=says):
        masked_optim.masked_adam_(**arguments)


def test_nothing_to_do_is_fine():
    masked_optim.masked_sgd_([], [], [], [], lr=0.1)
    masked_optim.masked_adam_([], [], [], [], [], [], step=1, lr=0.1)
    empty = torch.empty(0, 5)
    masked_optim.masked_sgd_([empty], [empty], [], [torch.empty(0, 1, dtype=torch.int32)], lr=0.1)
    assert empty.shape == (0, 5)
