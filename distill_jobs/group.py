"""The processes that train one student together.

Every process draws the whole batch of an update and takes its own rows of it, so one process and many learn from the
same rows and the same noise. Gradients are averaged after the backward pass, by one all-reduce per update: losses ask
denoisers by many methods (`velocity`, `jump`, derivatives), of which a wrapper such as DDP would see none. With
`shards`, FSDP2 holds a part of every weight, gradient and moment in each process instead, gathers a network's weights
while it is asked, and averages the gradients itself.

The process of rank 0 leads: it alone decides by the clock, evaluates, and writes.
"""

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from engines.denoiser import Denoiser

_PATIENCE = timedelta(hours=2)  # of the others while the leader evaluates


class Group:
    """One process among `size`. Without arguments it is alone, and everything here costs nothing."""

    def __init__(self, rank: int = 0, size: int = 1, *, shards: bool = False, device: str = "cpu") -> None:
        self.rank, self.size, self.shards, self.device = rank, size, shards, device

    @classmethod
    def join(cls, *, shards: bool = False, device: str = "cpu") -> "Group":
        """The group that torchrun put this process in, by its environment; alone without one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device=device)
        store, rank, size = next(rendezvous("env://"))
        # torchrun keeps one store over all of its restarts: without a name of its own a life would find the addresses
        # that dead processes left there.
        life = PrefixStore(f"life-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=life, rank=rank, world_size=size, timeout=_PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), shards=shards, device=device)

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def agree(self, value: int) -> int:
        """The leader's value, in every process."""
        if self.size == 1:
            return value
        told = torch.tensor(value)
        dist.broadcast(told, src=0)
        return int(told)

    def meet(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            dist.barrier()

    def total(self, value: int) -> int:
        """The sum of what the processes say, in every process."""
        if self.size == 1:
            return value
        told = torch.tensor(value)
        dist.all_reduce(told)
        return int(told)

    def average(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars by name, as means over the processes."""
        if self.size == 1 or not values:
            return dict(values)
        means = torch.stack([value.float() for value in values.values()])
        self._mean(means)
        return dict(zip(values, means.unbind(), strict=True))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Means over the processes, in place. Those of sharded parameters are means already."""
        if self.size == 1:
            return
        whole = [p.grad for p in parameters if p.grad is not None and not self._is_sharded(p)]
        if not whole:
            return
        flat = torch.cat([gradient.flatten() for gradient in whole])
        self._mean(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in whole])
        torch._foreach_copy_(whole, [part.view_as(to) for part, to in zip(parts, whole, strict=True)])

    def shard(self, network: nn.Module) -> None:
        """Spreads a network's weights over the processes, in place. Members of module lists (the blocks of UNets and
        transformers) are gathered and freed one by one."""
        if not self.shards:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(torch.device(self.device).type, (self.size,))
        lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        blocks = {block: None for blocks in lists for block in blocks}
        inner = {other for block in blocks for other in block.modules() if other is not block}
        for unit in [*(block for block in blocks if block not in inner), network]:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        if isinstance(network, Denoiser):
            register_fsdp_forward_method(network, "policy")  # asks the network too

    def whole(self, value: Tensor) -> Tensor:
        """All of a tensor of which this process may hold a part. Every process asks."""
        return value.full_tensor() if self._is_sharded(value) else value  # type: ignore[attr-defined]

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of every tensor, for the leader; nothing for the others, who have to ask as well."""
        found = {}
        for name, value in tensors.items():
            whole = self.whole(value)
            if self.leads:
                found[name] = whole
        return found

    def as_held(self, value: Tensor, live: Tensor) -> Tensor:
        """A copy of a whole tensor, cut as `live` is."""
        if not self._is_sharded(live):
            return value.clone()
        from torch.distributed.tensor import distribute_tensor

        held: Any = live
        return distribute_tensor(value.to(held.device), held.device_mesh, held.placements, src_data_rank=None)

    def _is_sharded(self, value: Tensor) -> bool:
        return self.shards and hasattr(value, "full_tensor")

    def _mean(self, value: Tensor) -> None:
        dist.all_reduce(value)
        value /= self.size
