"""Rows of all processes of a group, with gradients that go back to the process each row came from."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def check_alike(shapes: dict[str, Tensor | None], group: Any) -> None:
    """Every process of the group has tensors of the same shapes and dtypes; None counts as a shape.

    Another batch size would hang, or be read as something else.

    Raises:
        RuntimeError: torch.distributed is not initialised, or this process is not in the group.
        ValueError: they differ; in every process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "gather is True, but torch.distributed is not initialised; call torch.distributed.init_process_group first, "
            "or leave gather out"
        )
    if dist.get_rank(group) < 0:
        raise RuntimeError("gather is True, but this process is not in the group; pass a group that holds it")
    device = next(x.device for x in shapes.values() if x is not None)
    own = torch.tensor([number for x in shapes.values() for number in _description(x)], device=device)
    everyone = _all_gather(own, group)
    for i, name in enumerate(shapes):
        described = [tuple(row) for row in everyone[:, 5 * i : 5 * i + 5].tolist()]
        if len(set(described)) > 1:
            said = ", ".join(f"{_said(row)} in process {rank}" for rank, row in enumerate(described))
            raise ValueError(
                f"{name} differs between processes: {said}; gathering wants them alike: drop the last, smaller batch "
                "(drop_last=True), or cut all to the smallest"
            )


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def _description(x: Tensor | None) -> tuple[int, ...]:
    """(dtype, dimensions, sizes of the first three); -1 for None."""
    if x is None:
        return (-1,) * 5
    return (_DTYPES.index(x.dtype), x.ndim, *x.shape, *[0] * (3 - x.ndim))


def _said(description: tuple[int, ...]) -> str:
    dtype, ndim, *sizes = description
    return "None" if dtype < 0 else f"{tuple(sizes[:ndim])} {_DTYPES[dtype]}"


def others_rows(x: Tensor, group: Any) -> Tensor:
    """(size - 1, …): x of every process but this one, in their order; as `check_alike` found them, alike.

    The gradient that a process's rows get is the sum of those from all processes; the backward has to run in each of them.
    """
    rank = dist.get_rank(group)
    everyone = _AllGather.apply(x, group)
    return torch.cat((everyone[:rank], everyone[rank + 1 :]))


def _all_gather(x: Tensor, group: Any) -> Tensor:
    """(size, …): x of every process."""
    everyone = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(everyone), x.contiguous(), group)
    return everyone


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        # Summed in float32, since a sum over many processes in 16 bits loses what each adds.
        wide = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32, copy=True).contiguous()
        dist.all_reduce(wide, group=ctx.group)
        return wide[dist.get_rank(ctx.group)].to(grad.dtype), None
