"""The case of op "replicas": several tickets of one small network trained at once, against one after the other."""

import copy

import torch
from torch.nn import functional as F
from torch.nn.utils import prune

from sparselottery.bench.setups_common import Candidate, Work, make_generator, our_candidates

CHECKED = 3  # steps after which losses are compared: rounding grows from step to step
TRAINED, VALIDATED = 1200, 100  # examples
LR = 1.2e-3


def replicas(case, seed) -> Work:
    """`Trainer.fit_many` of `case.sizes`: (how many, steps, side of the images), each with its own mask and batch order."""
    import sparselottery as sl
    from sparselottery.experiments import models
    from sparselottery.nn import masked_modules

    count, steps, side = case.sizes
    generator = make_generator(case, seed)

    def draw(examples):
        x = torch.randn(examples, 1, side, side, generator=generator, device=case.device)
        return x, x.flatten(1)[:, :10].argmax(1)

    parts = [draw(n) for n in (TRAINED, VALIDATED, VALIDATED)]
    seeds = list(range(count))

    def trainer(budget, dtype=torch.float32):
        data = [(x.to(dtype), y) for x, y in parts]
        return sl.Trainer(*data, batch_size=case.batch, budget=budget, evaluate_every=budget, optimizer="adam", lr=LR)

    def tickets(dtype=torch.float32):
        made = [sl.sparsify(models.make("lenet-300-100", (1, side, side), 10, seed=s)) for s in seeds]
        for model in made:
            sl.prune(model, density=case.density)
        return [model.to(case.device, dtype) for model in made]

    def at_once(budget):
        fit, trained = trainer(budget), tickets()
        return lambda i: fit.fit_many(trained, seeds=seeds)

    def one_by_one(budget, dtype=torch.float32):
        fit, trained = trainer(budget, dtype), tickets(dtype)
        return lambda i: [fit.fit(model, seed=s) for model, s in zip(trained, seeds, strict=True)]

    def plain(masked):
        """What users write: a loop over the networks, with torch's fused optimizer."""
        trained = []
        for ticket in tickets():
            model = sl.densify(copy.deepcopy(ticket))
            if masked:
                layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
                for layer, (_, kept) in zip(layers, masked_modules(ticket), strict=True):
                    prune.custom_from_mask(layer, "weight", kept.mask.to_dense())
            trained.append(model)
        x, y = parts[0]

        def run(i):
            for model in trained:
                optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
                for _ in range(steps):
                    rows = torch.randint(len(x), (case.batch,), device=case.device)
                    optimizer.zero_grad(set_to_none=True)
                    F.cross_entropy(model(x[rows]), y[rows]).backward()
                    optimizer.step()

        return run

    def losses(histories):
        values = [[r.validation_loss for r in history.records] for history in histories]
        return [torch.tensor(values, dtype=torch.float64)]

    candidates = our_candidates(case, at_once(steps), lambda: losses(at_once(CHECKED)(0)))
    one = one_by_one(steps)
    candidates["masked, one by one"] = Candidate(one, lambda: losses(one_by_one(CHECKED)(0)))
    candidates["dense, one by one"] = Candidate(plain(False))
    candidates["prune-style, one by one"] = Candidate(plain(True))
    kept = sum(int(layer.mask.count) for _, layer in masked_modules(tickets()[0]))
    moved = count * steps * (28 * kept + 4 * case.batch * side**2)
    work = Work(candidates, lambda: losses(one_by_one(CHECKED, torch.float64)(0)), 1e-4, moved)
    work.operations = 6.0 * kept * case.batch * count * steps
    return work
