"""Optimizers as a person may write them: some that ZeRO can run, and some that it cannot."""

from __future__ import annotations

import torch


class Rule(torch.optim.Optimizer):
    """SGD; a subclass says what becomes of a gradient."""

    def __init__(self, params, lr, weight_decay, beta=0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.update(p, group, self.state), alpha=group["lr"])

    def update(self, p, group, state):
        return p.grad


class Counting(Rule):
    """An average without bias: remembers a tensor, a count and a number."""

    def update(self, p, group, state):
        if p not in state:
            state[p] = {"average": torch.zeros_like(p, dtype=torch.bfloat16), "step": 0, "left": torch.tensor(1.0)}
        own, beta = state[p], group["beta"]
        own["step"] += 1
        own["left"] *= beta
        own["average"].lerp_(p.grad.to(torch.bfloat16), 1 - beta)
        return own["average"].float() / (1 - own["left"]) * (1 + 1 / own["step"])


class ByNorm(Rule):
    def update(self, p, group, state):
        return p.grad / p.grad.norm()


class Noisy(Rule):
    def update(self, p, group, state):
        return p.grad + torch.randn_like(p)


class OnMatrices(Rule):
    def update(self, p, group, state):
        return p.grad / p.grad.norm(dim=1, keepdim=True)


class RememberingItself(Rule):
    def update(self, p, group, state):
        self.steps = getattr(self, "steps", 0) + 1
        return p.grad / self.steps


class RememberingInGroups(Rule):
    def update(self, p, group, state):
        group["steps"] = group.get("steps", 0) + 1
        return p.grad / group["steps"]


class KeepingRows(Rule):
    def update(self, p, group, state):
        state[p]["rows"] = torch.zeros(8)
        return p.grad


class NotANumber(Rule):
    def update(self, p, group, state):
        return (p.grad - p.grad) / 0


class Failing(Rule):
    def __init__(self, params, lr, weight_decay):
        raise ValueError("beta must be below 1\nand so on")


class WithoutDecay(Rule):
    def __init__(self, params, lr):
        super().__init__(params, lr, 0)
