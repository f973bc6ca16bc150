"""Distributed data parallel on two gloo processes: equal gradients, equal masks, zeros where they were."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparselottery as sl
from sparselottery.nn import masked_modules


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 16), nn.Linear(16, 3))
    sl.prune(model, density=0.3)
    return model


def batch(rank, step):
    g = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 1, 8, 8, generator=g), torch.randint(0, 3, (8,), generator=g)


def holds(model):
    return all((layer.weight[~layer.mask.to_dense()] == 0).all() for _, layer in masked_modules(model))


def worker(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        model = network().eval()  # BatchNorm by its running statistics: the same function on one process and on two
        if rank == 1:  # rank 0's masks and weights must win
            for _, layer in masked_modules(model):
                layer.set_mask(~layer.mask)
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01, weight_decay=0.1)
        facts = []
        for step in range(6):
            optimizer.zero_grad()
            if step == 2:  # two forwards before a backward, with accumulation
                with parallel.no_sync():
                    (F.cross_entropy(parallel(batch(rank, 50)[0]), batch(rank, 50)[1]) * 0).backward()
            x, y = batch(rank, step)
            F.cross_entropy(parallel(x), y).backward()
            optimizer.step()
            facts.append(holds(model))
            if step == 3:
                sl.prune(parallel, density=0.1, optimizer=optimizer)
                facts.append(holds(model))
        state = {key: value.clone() for key, value in model.state_dict().items()}
        results.put((rank, all(facts), {key: value.numpy() for key, value in state.items()}))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    rendezvous = os.path.join(tmp_path_factory.mktemp("gloo"), "rendezvous")
    processes = [context.Process(target=worker, args=(rank, rendezvous, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        got = sorted((results.get(timeout=120) for _ in processes), key=lambda r: r[0])
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return got


def test_the_invariant_holds_on_both_ranks_and_both_agree(outcome):
    (_, held0, state0), (_, held1, state1) = outcome
    assert held0 and held1
    assert all((state0[key] == state1[key]).all() for key in state0)


def test_the_result_is_that_of_one_process_on_both_batches(outcome):
    model = network().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(6):
        optimizer.zero_grad()
        for rank in range(2):
            x, y = batch(rank, step)
            (F.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
        if step == 3:
            sl.prune(model, density=0.1, optimizer=optimizer)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(outcome[0][2][key]), value, rtol=1e-4, atol=1e-5)
