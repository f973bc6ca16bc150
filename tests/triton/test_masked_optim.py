"""masked_optim's Triton kernels in the interpreter: several steps against the float64 reference."""

import math

import pytest
import torch

from sparselottery.kernels import masked_optim
from sparselottery.ops import reference

SHAPES = [(40, 33), (7,), (8, 3, 3, 3), (3, 1100), (), (0, 5)]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SGD = {"lr": 0.05, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.01, "nesterov": False, "maximize": False}
ADAM = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-6,
    "weight_decay": 0.1,
    "decoupled": False,
    "maximize": False,
}


def sample(dtype, density=0.3):
    """Parameters with NaN at dead places, bool masks, words; the second and fourth are dense."""
    g = torch.Generator().manual_seed(0)
    keep = [torch.rand(s, generator=g) < density for s in SHAPES]
    keep = [torch.ones_like(k) if i in (1, 3) else k for i, k in enumerate(keep)]
    params = [torch.where(k, torch.randn(k.shape, generator=g), math.nan).to(dtype) for k in keep]
    return params, keep, [None if i in (1, 3) else reference.bitmask_pack(k) for i, k in enumerate(keep)]


def gradients(keep, step, dtype):
    g = torch.Generator().manual_seed(step)
    return [torch.where(k, torch.randn(k.shape, generator=g), math.nan).to(dtype) for k in keep]


def assert_near(got, want, keep, tolerance):
    for a, b, k in zip(got, want, keep, strict=True):
        assert (a[~k] == 0).all()
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoupled": True, "maximize": True},
        {"amsgrad": True, "weight_decay": 0.0},
    ],
)
def test_adam(dtype, options):
    options = dict(options)
    amsgrad = options.pop("amsgrad", False)
    params, keep, words = sample(dtype)
    state = [
        [torch.full_like(p, math.nan).masked_fill_(k, 0) for p, k in zip(params, keep, strict=True)] for _ in "abc"
    ]
    for step in (1, 2, 3, 4):
        grads = gradients(keep, step, dtype)
        # Each step is compared from the same start: low precision would drift over several.
        wanted = [[t.double() for t in tensors] for tensors in (params, *state)]
        for i, words_i in enumerate(words):
            largest = wanted[3][i] if amsgrad else None
            lists = (wanted[0][i], grads[i].double(), wanted[1][i], wanted[2][i], largest, words_i)
            reference.masked_adam_(*lists, step=step, **(ADAM | options))
        lists = (params, grads, *state[:2], state[2] if amsgrad else [], words)
        clean = [step > 1] * len(params)
        masked_optim.adam_(*lists, step=[step] * len(params), clean=clean, **(ADAM | options))
        for got, want in zip((params, *state[: 3 if amsgrad else 2]), wanted, strict=False):
            assert_near(got, want, keep, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"nesterov": True},
        {"dampening": 0.5, "maximize": True, "weight_decay": 0.0},
    ],
)
def test_sgd(dtype, options):
    params, keep, words = sample(dtype)
    buffers = [torch.full_like(p, math.nan) for p in params]  # the first step must ignore what lies there
    options = SGD | options
    for step in (1, 2, 3):
        grads = gradients(keep, step, dtype)
        wanted, wanted_buffers = [p.double() for p in params], [b.double() for b in buffers]
        for i, words_i in enumerate(words):
            lists = (wanted[i], grads[i].double(), wanted_buffers[i], words_i)
            reference.masked_sgd_(*lists, first=step == 1, **options)
        flags = {"first": [step == 1] * len(params), "clean": [step > 1] * len(params)}
        masked_optim.sgd_(params, grads, buffers if options["momentum"] else [], words, **flags, **options)
        assert_near(params, wanted, keep, TOLERANCE[dtype])
        if options["momentum"]:
            assert_near(buffers, wanted_buffers, keep, TOLERANCE[dtype])


def test_clean_leaves_dead_memory_alone():
    param, words = torch.full((2, 64), 5.0), torch.tensor([[1, 0], [0, -1]], dtype=torch.int32)
    options = SGD | {"momentum": 0.0, "weight_decay": 0.0, "lr": 1.0}
    masked_optim.sgd_([param], [torch.ones(2, 64)], [], [words], first=[False], clean=[True], **options)
    assert param[0, 0] == 4 and (param[0, 1:] == 5).all() and (param[1, :32] == 5).all() and (param[1, 32:] == 4).all()
    masked_optim.sgd_([param], [torch.ones(2, 64)], [], [words], first=[False], clean=[False], **options)
    assert param[0, 0] == 3 and (param[0, 1:] == 0).all() and (param[1, :32] == 0).all() and (param[1, 32:] == 3).all()


def test_strides_and_steps_may_differ_between_tensors():
    params, keep, words = sample(torch.float32)
    params, keep, words = ([x[i] for i in (0, 2)] for x in (params, keep, words))
    params = [params[0].t().contiguous().t(), params[1].to(memory_format=torch.channels_last)]
    assert not any(p.is_contiguous() for p in params)
    grads = gradients(keep, 1, torch.float32)
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    wanted = [p.double() for p in params]
    for i, step in enumerate((1, 30)):
        lists = (wanted[i], grads[i].double(), m[i].double(), v[i].double(), None, words[i])
        reference.masked_adam_(*lists, step=step, **ADAM)
    masked_optim.adam_(params, grads, m, v, [], words, step=[1, 30], clean=[False, False], **ADAM)
    assert_near(params, wanted, keep, 3e-6)
    assert not any(p.is_contiguous() for p in params)


def test_a_survivors_nan_stays_with_it():
    param, grad = torch.ones(1, 64), torch.ones(1, 64)
    grad[0, 3] = math.nan
    m, v = torch.zeros(1, 64), torch.zeros(1, 64)
    words = torch.tensor([[0b11010, 0]], dtype=torch.int32)
    largest = torch.zeros(1, 64)
    masked_optim.adam_([param], [grad], [m], [v], [largest], [words], step=[1], clean=[False], **ADAM)
    assert param.isnan().nonzero().tolist() == [[0, 3]] and largest.isnan().nonzero().tolist() == [[0, 3]]
    assert param.nan_to_num(1).nonzero()[:, 1].tolist() == [1, 3, 4]


def test_programs_start_where_rows_say():
    blocks = masked_optim._blocks(((70, 27), (1, 2100), (0, 1)), torch.device("cpu"))
    assert blocks.tolist() == [[0, 0, 0], [0, 32, 0], [0, 64, 0], [1, 0, 0], [1, 0, 32], [1, 0, 64]]


def test_the_op_calls_the_kernels(monkeypatch):
    """As on a CUDA device: the way from the op's arguments to the launches."""
    from sparselottery.ops import masked_optim as op

    monkeypatch.setattr(op, "backend_of", lambda param: "triton")
    params, keep, words = sample(torch.float32)
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    grads = gradients(keep, 1, torch.float32)
    wanted = [p.double() for p in params]
    for i, words_i in enumerate(words):
        lists = (wanted[i], grads[i].double(), state[0][i].double(), state[1][i].double(), None, words_i)
        reference.masked_adam_(*lists, step=1, **ADAM)
    op.masked_adam_(params, grads, *state, [], words, step=1, **ADAM)
    assert_near(params, wanted, keep, 3e-6)
    wanted = [p.double() for p in params]
    for i, words_i in enumerate(words):
        reference.masked_sgd_(wanted[i], grads[i].double(), None, words_i, first=False, **(SGD | {"momentum": 0.0}))
    op.masked_sgd_(params, grads, [], words, **(SGD | {"momentum": 0.0}))
    assert_near(params, wanted, keep, 3e-6)
