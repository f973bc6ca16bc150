"""A lottery ticket in reinforcement learning: REINFORCE on CartPole.

    pip install gymnasium
    python examples/cartpole_ticket.py --rounds 2 --episodes 150 --seeds 2

The policy learns from its own episodes, so there is no data set and no accuracy: `fit` says how good the policy is as the mean
return of its last episodes over the largest possible one. `sl.imp` does not mind.
"""

import argparse
import functools
import sys

import gymnasium
import torch
from torch import nn

import sparselottery as sl


def make_policy():
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def episode(environment, policy, seed):
    """One episode: log-probabilities of the actions taken, [T], and how long it lasted, which is its return."""
    observation, _ = environment.reset(seed=seed)
    taken, done = [], False
    while not done:
        chances = torch.distributions.Categorical(logits=policy(torch.as_tensor(observation, dtype=torch.float32)))
        action = chances.sample()
        taken.append(chances.log_prob(action))
        observation, _, fell, late, _ = environment.step(action.item())
        done = fell or late
    return torch.stack(taken), len(taken)


def fit(policy, *, seed, budget, longest=200, lr=3e-3):
    """REINFORCE with normalized returns for `budget` episodes (Williams 1992, Machine Learning 8:229)."""
    environment = gymnasium.make("CartPole-v1", max_episode_steps=longest)
    optimizer = sl.optim.Adam(policy.parameters(), lr=lr)
    torch.manual_seed(seed)
    returns = []
    for i in range(budget):
        log_probabilities, length = episode(environment, policy, seed=1000 * seed + i)
        returns.append(length)
        to_go = torch.zeros(length)
        following = 0.0
        for t in reversed(range(length)):
            to_go[t] = following = 1 + 0.99 * following
        if length > 1:
            to_go = (to_go - to_go.mean()) / (to_go.std() + 1e-8)
        optimizer.zero_grad()
        (-(log_probabilities * to_go).sum()).backward()
        optimizer.step()
    environment.close()
    last = returns[-max(1, budget // 5) :]
    return {"test_accuracy": sum(last) / len(last) / longest}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--episodes", type=int, default=150)
    parser.add_argument("--longest", type=int, default=200, help="steps of an episode, at most")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", default="cartpole.safetensors")
    arguments = parser.parse_args()

    result = sl.imp(
        make_policy,
        functools.partial(fit, longest=arguments.longest),
        rounds=arguments.rounds,
        rate=arguments.rate,
        seeds=arguments.seeds,
        budget=arguments.episodes,
        controls=("random-mask",),
        progress=lambda event: print(f"{event['done']} of {event['total']} trainings", file=sys.stderr),
    )
    for level in result.levels:
        for kind in ("ticket", "random-mask"):
            if kind in level:
                value = level[kind]["test_accuracy"]
                spread = "" if value["ci95"] is None else f" ± {arguments.longest * value['ci95']:.0f}"
                mean = arguments.longest * value["mean"]
                print(f"{100 * level['density']:6.2f} % of the weights, {kind}: mean return {mean:.0f}{spread}")
    ticket = result.ticket(level=arguments.rounds)
    print(f"{ticket.count} of {ticket.total} weights: {ticket.save(arguments.out)}")


if __name__ == "__main__":
    main()
