"""What masked_linear's cpu backend keeps between calls: nothing stale, gradient memory lent and taken back, threads."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layer_samples import forward_on_cpu, sparse_sample
from torch.nn import functional as F

from sparselottery.ops import masked_linear_index, reference
from sparselottery.ops.masked_linear import masked_linear


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "cpu")


def test_mask_changed_in_place(cpu):
    x, w, _, _, keep = sparse_sample(5, 90, 50, 0.3)
    words = reference.bitmask_pack(keep)
    forward_on_cpu(x, w, words)
    words.zero_()
    assert (forward_on_cpu(x, w, words) == 0).all()
    words.data.copy_(reference.bitmask_pack(keep))  # moves no version counter
    torch.testing.assert_close(forward_on_cpu(x, w, words), x @ (w * keep).t())


def test_weight_changed_in_place(cpu):
    x, w, _, _, keep = sparse_sample(5, 90, 50, 0.3)
    words = reference.bitmask_pack(keep)
    for change in (lambda: None, lambda: w.mul_(2), lambda: w.data.add_(1), lambda: w.detach().sub_(3)):
        change()
        torch.testing.assert_close(forward_on_cpu(x, w, words), x @ (w * keep).t())
        torch.testing.assert_close(forward_on_cpu(x[0], w, words), (w * keep) @ x[0])


def test_zeros_do_not_hide_a_change(cpu):
    """As after a mask has grown: 59 of 60 survivors are 0, which a scaling past the version counter leaves as they are."""
    for seed in range(6):
        x, w, _, _, few = sparse_sample(40, 900, 500, 0.005, seed)
        keep = few | (torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) < 0.3)
        w, words = w * few, reference.bitmask_pack(keep)
        forward_on_cpu(x, w, words)
        w.data.mul_(1.5)
        torch.testing.assert_close(forward_on_cpu(x, w, words), x @ w.t(), atol=1e-4, rtol=1e-4)


def test_one_mask_for_several_weights(cpu):
    x, w, _, _, keep = sparse_sample(5, 90, 50, 0.3)
    words = reference.bitmask_pack(keep)
    for i in range(4):
        other = w * i  # freed after each turn: the next one may have its address and its version
        torch.testing.assert_close(forward_on_cpu(x, other, words), x @ (other * keep).t())


def test_backward_uses_the_weight_of_its_own_forward(cpu):
    x, w, _, grad, keep = sparse_sample(5, 90, 50, 0.3)
    words = reference.bitmask_pack(keep)
    a, b = w.clone().requires_grad_(), (w + 1).requires_grad_()
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = masked_linear(first, a, words), masked_linear(second, b, words)
    torch.testing.assert_close(torch.autograd.grad(ya, first, grad)[0], grad @ (w * keep))
    torch.testing.assert_close(torch.autograd.grad(yb, second, grad)[0], grad @ ((w + 1) * keep))


def test_indexes_go_with_their_masks(cpu):
    x, w, _, _, keep = sparse_sample(5, 90, 50, 0.3)
    words = reference.bitmask_pack(keep)
    forward_on_cpu(x, w, words)
    assert id(words) in masked_linear_index.INDEXES
    key = id(words)
    del words
    gc.collect()
    assert key not in masked_linear_index.INDEXES


def test_recycled_gradient_memory(cpu, monkeypatch):
    """Gradients keep their memory while anything uses it, and come out right however the memory was left."""
    monkeypatch.setattr(masked_linear_index.Memory, "SMALLEST", 0)
    x, w, _, grad, keep = sparse_sample(5, 90, 50, 0.3)
    words = reference.bitmask_pack(keep)
    w.requires_grad_()
    wanted = (grad.t() @ x) * keep

    def backward(**options):
        y = masked_linear(x, w, words)
        return torch.autograd.grad(y, w, grad, **options)[0]

    kept = backward()
    addresses = {kept.data_ptr()}
    view = backward()[3:]  # a view alone keeps the memory
    array = backward().numpy()
    for _ in range(3):
        g = backward()
        assert g.data_ptr() not in (kept.data_ptr(), view.data_ptr(), array.ctypes.data)
        addresses.add(g.data_ptr())
        torch.testing.assert_close(g, wanted)
        g.data.fill_(torch.nan)  # what a user leaves behind must not come back
        del g
    torch.testing.assert_close(kept, wanted)
    torch.testing.assert_close(view, wanted[3:])
    torch.testing.assert_close(torch.from_numpy(array), wanted)
    assert len(addresses) < 4  # memory was lent again

    for _ in range(3):  # accumulation takes the first gradient's memory over
        masked_linear(x, w, words).backward(grad)
    torch.testing.assert_close(w.grad, 3 * wanted)
    y = masked_linear(x, w, words)
    one = torch.autograd.grad(y, w, grad, retain_graph=True)[0]
    two = torch.autograd.grad(y, w, 2 * grad)[0]
    torch.testing.assert_close(one, wanted)
    torch.testing.assert_close(two, 2 * wanted)


def test_recycled_gradient_memory_with_its_zeros(cpu, monkeypatch):
    """Zeros off the mask are not written again where they are known to be; whatever is done to a gradient, the next is right."""
    monkeypatch.setattr(masked_linear_index.Memory, "SMALLEST", 0)
    x, w, _, grad, keep = sparse_sample(5, 90, 50, 0.3)
    words = reference.bitmask_pack(keep)
    w.requires_grad_()
    dead = (~keep).nonzero()[7].tolist()
    index = masked_linear_index.index_of(words, tuple(w.shape))

    def backward(scale=1.0):
        return torch.autograd.grad(masked_linear(x, w, words), w, scale * grad)[0]

    def one_dead(g):
        g[dead[0], dead[1]] = 1

    def view_of_rows(g):
        g[10:].add_(1)

    def in_a_graph(g):
        leaf = torch.ones(1, requires_grad=True)
        (g.mul_(leaf) * 2).sum().backward()
        g.detach().add_(1)

    def deaf_to_counters(g):
        g.data.add_(1)

    def numpy_write(g):
        g.numpy()[:] = float("nan")

    def through_storage(g):
        g.untyped_storage().fill_(1)

    def from_storage(g):
        torch.empty(0).set_(g.untyped_storage()).add_(1)

    def other_mask(g):
        words.data.copy_(reference.bitmask_pack(~keep))
        torch.testing.assert_close(backward(), (grad.t() @ x) * ~keep)
        words.data.copy_(reference.bitmask_pack(keep))

    def mask_counted(g):
        words.copy_(reference.bitmask_pack(~keep))
        torch.testing.assert_close(backward(), (grad.t() @ x) * ~keep)
        words.copy_(reference.bitmask_pack(keep))

    nothing = [lambda g: None] * 3
    harmless = [lambda g: g.mul_(0.5), lambda g: g.neg_(), lambda g: g.share_memory_().add_(1)]
    changes = [one_dead, view_of_rows, in_a_graph, deaf_to_counters, numpy_write, through_storage, from_storage]
    for i, change in enumerate([*nothing, *harmless, *changes, other_mask, mask_counted, *nothing]):
        g = backward(i + 1.0)
        assert (g[~keep] == 0).all()
        torch.testing.assert_close(g, (i + 1) * (grad.t() @ x) * keep)
        change(g)
        del g
    index = masked_linear_index.index_of(words, tuple(w.shape))
    _, is_zero = index.gradient.lend(tuple(w.shape), index.plan)
    assert is_zero  # the untouched ones are trusted: the test above is of that path


def test_gradients_that_somebody_keeps(cpu, monkeypatch):
    """Accumulation, retain_graph, hooks, two uses in a graph, zero_grad in place: memory in use is never lent."""
    monkeypatch.setattr(masked_linear_index.Memory, "SMALLEST", 0)
    x, w, _, grad, keep = sparse_sample(5, 90, 50, 0.3)
    words = reference.bitmask_pack(keep)
    w.requires_grad_()
    wanted = (grad.t() @ x) * keep
    optimizer = torch.optim.SGD([w], lr=0.0)

    for set_to_none in (True, False, True):
        for step in range(1, 4):
            masked_linear(x, w, words).backward(step * grad)
            torch.testing.assert_close(w.grad, wanted * sum(range(1, step + 1)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)

    seen = []
    handle = w.register_hook(seen.append)
    for step in range(1, 5):
        masked_linear(x, w, words).backward(step * grad)
        w.grad = None
    handle.remove()
    for step, g in enumerate(seen, 1):
        torch.testing.assert_close(g, step * wanted)
    assert len({g.data_ptr() for g in seen}) == len(seen)
    seen.clear()

    for _ in range(3):
        y = masked_linear(x, w, words)
        (y + masked_linear(2 * x, w, words)).backward(grad, retain_graph=True)
        torch.testing.assert_close(w.grad, 3 * wanted)
        y.backward(grad)
        torch.testing.assert_close(w.grad, 4 * wanted)
        w.grad.data.add_(1)
        w.grad = None

    for _ in range(3):  # the weight is also used without its mask: the sum has no zeros
        (masked_linear(x, w, words) + F.linear(x, w)).backward(grad)
        torch.testing.assert_close(w.grad, wanted + grad.t() @ x)
        w.grad = None


def test_gradients_in_several_threads(cpu, monkeypatch):
    monkeypatch.setattr(masked_linear_index.Memory, "SMALLEST", 0)
    x, w, _, grad, keep = sparse_sample(5, 90, 50, 0.3)
    words = reference.bitmask_pack(keep)
    wanted = (grad.t() @ x) * keep

    def train(number):
        mine, kept = w.clone().requires_grad_(), []
        for step in range(20):
            masked_linear(x, mine, words).backward((number + step) * grad)
            kept.append(mine.grad)
            if step % 3 == 0:
                kept.pop().add_(1)
            mine.grad = None
        steps = [step for step in range(20) if step % 3]
        return all(
            torch.allclose(g, (number + s) * wanted, rtol=1e-4, atol=1e-4) for s, g in zip(steps, kept, strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(train, range(1, 9)))


def test_gradients_of_compiled_code_are_not_trusted(cpu, monkeypatch):
    """Compiled code may write to the memory without moving a counter."""
    monkeypatch.setattr(masked_linear_index.Memory, "SMALLEST", 0)
    x, w, _, grad, keep = sparse_sample(5, 90, 50, 0.3)
    words = reference.bitmask_pack(keep)
    arguments = (grad, x, w, words, False, [False, True, False])
    torch.ops.sparselottery.masked_linear_backward(*arguments)
    index = masked_linear_index.index_of(words, tuple(w.shape))
    assert not index.gradient.lend(tuple(w.shape), index.plan)[1]


def test_inference_tensors(monkeypatch):
    x, w, b, _, keep = sparse_sample(5, 90, 60, 0.1)
    with torch.inference_mode():
        weight, words = w.clone(), reference.bitmask_pack(keep)
        torch.testing.assert_close(masked_linear(x, weight, words, b), F.linear(x, w * keep, b))
        monkeypatch.setenv("SPARSELOTTERY_BACKEND", "cpu")
        torch.testing.assert_close(masked_linear(x, weight, words, b), F.linear(x, w * keep, b))


# ---- threads ----
