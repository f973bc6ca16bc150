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


def sgd_(params, grads, buffers, words, *, first, clean, **options):
    masked_optim.Table(params, grads, (buffers, [], []), words, clean, first).sgd(**options)


def adam_(params, grads, exp_avgs, exp_avg_sqs, largest, words, *, clean, **options):
    fresh = [False] * len(params)
    masked_optim.Table(params, grads, (exp_avgs, exp_avg_sqs, largest), words, clean, fresh).adam(**options)


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
        adam_(*lists, step=[step] * len(params), clean=clean, **(ADAM | options))
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
        sgd_(params, grads, buffers if options["momentum"] else [], words, **flags, **options)
        assert_near(params, wanted, keep, TOLERANCE[dtype])
        if options["momentum"]:
            assert_near(buffers, wanted_buffers, keep, TOLERANCE[dtype])


def test_clean_leaves_dead_memory_alone():
    param, words = torch.full((2, 64), 5.0), torch.tensor([[1, 0], [0, -1]], dtype=torch.int32)
    options = SGD | {"momentum": 0.0, "weight_decay": 0.0, "lr": 1.0}
    sgd_([param], [torch.ones(2, 64)], [], [words], first=[False], clean=[True], **options)
    assert param[0, 0] == 4 and (param[0, 1:] == 5).all() and (param[1, :32] == 5).all() and (param[1, 32:] == 4).all()
    sgd_([param], [torch.ones(2, 64)], [], [words], first=[False], clean=[False], **options)
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
    adam_(params, grads, m, v, [], words, step=[1, 30], clean=[False, False], **ADAM)
    assert_near(params, wanted, keep, 3e-6)
    assert not any(p.is_contiguous() for p in params)


def test_a_survivors_nan_stays_with_it():
    param, grad = torch.ones(1, 64), torch.ones(1, 64)
    grad[0, 3] = math.nan
    m, v = torch.zeros(1, 64), torch.zeros(1, 64)
    words = torch.tensor([[0b11010, 0]], dtype=torch.int32)
    largest = torch.zeros(1, 64)
    adam_([param], [grad], [m], [v], [largest], [words], step=[1], clean=[False], **ADAM)
    assert param.isnan().nonzero().tolist() == [[0, 3]] and largest.isnan().nonzero().tolist() == [[0, 3]]
    assert param.nan_to_num(1).nonzero()[:, 1].tolist() == [1, 3, 4]


def test_programs_start_where_rows_say():
    blocks = masked_optim._blocks([(70, 27), (1, 2100), (0, 1)], torch.device("cpu"))
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


def rounded(master, dtype):
    """As the interpreter does it: to nearest for float16, toward zero for bfloat16 (compiled code: to nearest, see tests/gpu)."""
    return (
        (master.view(torch.int32) & -65536).view(torch.float32).to(dtype)
        if dtype is torch.bfloat16
        else master.to(dtype)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_masters_and_their_rounded_copies(dtype, rule):
    masters, keep, words = sample(torch.float32)
    copies = [torch.full_like(p, math.nan, dtype=dtype) for p in masters]
    state = [[torch.zeros_like(p) for p in masters] for _ in range(2)]
    for step in (1, 2, 3):
        grads = gradients(keep, step, dtype)
        wanted = [[t.double() for t in tensors] for tensors in (masters, *state)]
        lists = (masters, grads, (*state, []), words, [step > 1] * len(masters), [step == 1] * len(masters), copies)
        table = masked_optim.Table(*lists)
        if rule == "adam":
            table.adam(step=[step] * len(masters), **ADAM)
        else:
            table.sgd(**SGD)
        for i, words_i in enumerate(words):
            if rule == "adam":
                lists = (wanted[0][i], grads[i].double(), wanted[1][i], wanted[2][i], None, words_i)
                reference.masked_adam_(*lists, step=step, **ADAM)
            else:
                lists = (wanted[0][i], grads[i].double(), wanted[1][i], words_i)
                reference.masked_sgd_(*lists, first=step == 1, **SGD)
        assert_near(masters, wanted[0], keep, 3e-6)
        for p, copy in zip(masters, copies, strict=True):
            assert torch.equal(copy, rounded(p, dtype))


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01), torch.tensor([0.01], dtype=torch.float64)], ids=repr)
@pytest.mark.parametrize("decoupled", [False, True])
def test_step_numbers_on_the_device(lr, decoupled):
    """Rate and correction of each tensor from its own counter, to float64's accuracy, also where 1 - beta2^step cancels."""
    options = ADAM | {"decoupled": decoupled, "beta2": 0.999}
    params, keep, words = sample(torch.float32)
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    steps = [torch.tensor(float(n)) for n in (0, 3, 999, 12345, 0, 1)]
    flags = ([False] * len(params), [False] * len(params))
    table = masked_optim.Table(params, gradients(keep, 1, torch.float32), (*state, []), words, *flags, None, steps)
    for _ in range(2):
        wanted = [[t.double() for t in tensors] for tensors in (params, *state)]
        grads = gradients(keep, 2, torch.float32)
        assert table.serves(grads)
        before = [n.item() for n in steps]
        table.adam(step=steps, **(options | {"lr": lr}))
        assert [n.item() for n in steps] == [n + 1 for n in before]
        rate = float(lr)
        numbers = [(rate / (1 - 0.9**n), (1 - 0.999**n) ** -0.5, 1 - rate * 0.1 * decoupled) for n in map(float, steps)]
        torch.testing.assert_close(table.numbers.view(-1, 3), torch.tensor(numbers), rtol=2e-7, atol=0)
        for i, words_i in enumerate(words):
            lists = (wanted[0][i], grads[i].double(), wanted[1][i], wanted[2][i], None, words_i)
            reference.masked_adam_(*lists, step=steps[i].item(), **options)
        assert_near(params, wanted[0], keep, 3e-6)


def test_channels_last_filters_are_stepped_where_they_lie():
    shapes = [(8, 5, 3, 3), (4, 40, 1, 2), (6, 3, 2, 2)]
    g = torch.Generator().manual_seed(3)
    keep = [torch.rand(s, generator=g) < 0.3 for s in shapes]
    words = [reference.bitmask_pack(k) for k in keep]
    words[2], keep[2] = None, torch.ones_like(keep[2])

    def last(tensors):
        return [t.to(memory_format=torch.channels_last) for t in tensors]

    params = last(torch.where(k, torch.randn(k.shape, generator=g), math.nan) for k in keep)
    state = [last(torch.zeros_like(p) for p in params) for _ in range(2)]
    grads = last(torch.where(k, torch.randn(k.shape, generator=g), math.nan) for k in keep)
    wanted = [[t.double() for t in tensors] for tensors in (params, *state)]
    table = masked_optim.Table(params, grads, (*state, []), words, [False] * 3, [False] * 3)
    assert not table.stand_ins
    table.adam(step=[1] * 3, **ADAM)
    for i, words_i in enumerate(words):
        lists = (wanted[0][i], grads[i].double(), wanted[1][i], wanted[2][i], None, words_i)
        reference.masked_adam_(*lists, step=1, **ADAM)
    assert_near(params, wanted[0], keep, 3e-6)
    for got, want in zip(state, wanted[1:], strict=True):
        assert_near(got, want, keep, 3e-6)
    # Gradients of another layout are copied, and right.
    grads = [g.contiguous() for g in grads]
    assert not table.serves(grads)
    table = masked_optim.Table(params, grads, (*state, []), words, [True] * 3, [False] * 3)
    assert len(table.stand_ins) == 3
    table.adam(step=[2] * 3, **ADAM)
    for i, words_i in enumerate(words):
        lists = (wanted[0][i], grads[i].double(), wanted[1][i], wanted[2][i], None, words_i)
        reference.masked_adam_(*lists, step=2, **ADAM)
    assert_near(params, wanted[0], keep, 3e-6)


def test_in_a_capture_addresses_travel_in_kernel_arguments(monkeypatch):
    """Nothing is copied from the host, addresses of 64 bits arrive whole, and gradients are sent anew each time."""
    device = torch.device("cpu")
    values = [0, 1, -1, 2**31, 2**47 + 12345, 2**62 + 1, -(2**63)]
    monkeypatch.setattr(masked_optim, "_capturing", lambda device: True)
    assert masked_optim._upload(values, device).tolist() == values
    assert masked_optim._upload([], device).tolist() == []
    params, keep, words = sample(torch.float32)
    flags = ([False] * len(params), [False] * len(params))
    grads = gradients(keep, 1, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda *a, **k: pytest.fail("a copy"))
        table = masked_optim.Table(params, grads, ([], [], []), words, *flags)
        first = table.grads
        assert table.serves(grads) and table.grads is not first
    wanted = [p.double() for p in params]
    options = SGD | {"momentum": 0.0}
    for i, words_i in enumerate(words):
        reference.masked_sgd_(wanted[i], grads[i].double(), None, words_i, first=False, **options)
    table.sgd(**(options | {"lr": torch.tensor(0.05)}))
    assert_near(params, wanted, keep, 3e-6)


@pytest.mark.parametrize(
    "name, options", [("SGD", {"momentum": 0.9}), ("AdamW", {"capturable": True, "weight_decay": 0.1})]
)
@pytest.mark.parametrize("master_weights", [False, True])
def test_optimizers_wait_for_nothing_and_launch_once(monkeypatch, name, options, master_weights):
    """sparselottery.optim as on a CUDA device, against torch.optim."""
    from sync_counter import SyncCounter

    from sparselottery import masks, optim
    from sparselottery.ops import masked_optim as op

    class Owner:
        def __init__(self, param, words):
            self.weight_mask = words
            masks.attach(param, self)

    monkeypatch.setattr(op, "backend_of", lambda param: "triton")
    dtype = torch.bfloat16 if master_weights else torch.float32
    values, keep, words = sample(torch.float32)
    values = [torch.where(k, v, 0).to(dtype) for v, k in zip(values, keep, strict=True)]
    params = [torch.nn.Parameter(v.clone()) for v in values]
    twins = [torch.nn.Parameter(v.float()) for v in values]
    owners = [Owner(p, w) for p, w in zip(params, words, strict=True) if w is not None]
    ours = getattr(optim, name)(params, lr=torch.tensor(0.01), master_weights=master_weights, **options)
    options = options | {"capturable": False} if "capturable" in options else options
    theirs = getattr(torch.optim, name)(twins, lr=0.01, **options)
    launches = []
    launch = masked_optim.Table._launch
    monkeypatch.setattr(
        masked_optim.Table, "_launch", lambda self, *a, **k: (launches.append(self), launch(self, *a, **k))
    )
    for step in range(6):
        grads = gradients(keep, step, dtype)
        for p, q, g, k in zip(params, twins, grads, keep, strict=True):
            p.grad, q.grad = g, torch.where(k, g, 0).float()
        with SyncCounter() as counter:
            ours.step()
        theirs.step()
        assert counter.names == [] or step == 0
    assert len(launches) == 6 and len(owners) == 4
    assert launches[3] is launches[4] is launches[5]
    for p, q in zip(params, twins, strict=True):
        if master_weights:
            master = ours.state[p]["master_param"]
            assert torch.equal(p, rounded(master, dtype))
            p = master
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
