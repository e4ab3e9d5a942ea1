"""What a step does to one tensor, as formulas: Muon's momentum and scale, decoupled decay, AdamW.

Muon with Moonlight's changes (arXiv 2502.16982, section 2.2), for a matrix W of A x B with gradient G:

    M <- mu M + G
    O <- NewtonSchulz(G + mu M)  with Nesterov's momentum, NewtonSchulz(M) without
    W <- W - eta * (0.2 * sqrt(max(A, B)) * O + lambda W)

An orthogonal O has entries of root mean square 1 / sqrt(max(A, B)), so the scale makes the update as large as AdamW's
usually is (0.2 to 0.4), and one learning rate and decay serve both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

UPDATE_RMS = 0.2


def momentum_directions(
    grads: Sequence[Tensor], momenta: Sequence[Tensor], *, momentum: float, nesterov: bool
) -> list[Tensor]:
    """Updates the momenta in place and returns what is to be orthogonalised.

    Args:
        grads: any floating dtype.
        momenta: of the same shapes; changed. What is narrower than float32 is computed in float32 and rounded once;
            the direction is not rounded.
        momentum: mu.
        nesterov: whether the direction looks one step ahead.

    Returns:
        New tensors of the momenta's dtype, at least float32; without Nesterov the momenta themselves, if they are that.
    """
    averages = [m.to(torch.promote_types(m.dtype, torch.float32)) for m in momenta]
    same = [grad.to(m.dtype) for grad, m in zip(grads, averages, strict=True)]
    torch._foreach_mul_(averages, momentum)
    torch._foreach_add_(averages, same)
    for kept, average in zip(momenta, averages, strict=True):
        if kept is not average:
            kept.copy_(average)
    return list(torch._foreach_add(same, averages, alpha=momentum)) if nesterov else averages


def muon_scale(rows: int, columns: int) -> float:
    """What an orthogonal update of a rows x columns matrix is multiplied with, before the learning rate."""
    return UPDATE_RMS * math.sqrt(max(rows, columns))


def apply_updates_(params: Sequence[Tensor], updates: Sequence[Tensor], *, lr: float, weight_decay: float) -> None:
    """W <- W - lr * (update + weight_decay * W), in place.

    Args:
        params: changed.
        updates: of the same shapes; of another dtype, the sum is computed in the wider one.
        lr: learning rate.
        weight_decay: lambda.
    """
    if weight_decay:
        torch._foreach_mul_(list(params), 1 - lr * weight_decay)
    for parameter, update in zip(params, updates, strict=True):
        parameter.add_(update, alpha=-lr)


def adamw_update(state: Mapping[str, Tensor], *, betas: tuple[float, float], eps: float) -> Tensor:
    """The update that the last ``adamw_`` made of a tensor, before the learning rate and without decay.

    Args:
        state: of the tensor, after it.
        betas: as there.
        eps: as there.
    """
    steps = state["step"]
    scale = (state["exp_avg_sq"] / (1 - betas[1] ** steps)).sqrt_().add_(eps)
    return torch.div(state["exp_avg"], scale, out=scale).div_(1 - betas[0] ** steps)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW (arXiv 1711.05101) in place, by torch's own fused kernel, in the precision of the state.

    Args:
        params: changed.
        grads: of the same shapes.
        states: ``exp_avg``, ``exp_avg_sq`` (contiguous) and ``step`` (a 0-d float32 tensor) of each; changed.
        lr: learning rate.
        betas: decay of the two averages.
        eps: added to the root of the second.
        weight_decay: decoupled, times lr.
    """
    # The kernel walks over memory without regard to strides and wants one dtype: all others work on a copy.
    averages = [state["exp_avg"] for state in states]
    work = [p.to(m.dtype).contiguous() for p, m in zip(params, averages, strict=True)]
    adamw(
        work,
        [grad.to(m.dtype).contiguous() for grad, m in zip(grads, averages, strict=True)],
        averages,
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    for parameter, worked in zip(params, work, strict=True):
        if worked is not parameter:
            parameter.copy_(worked)
