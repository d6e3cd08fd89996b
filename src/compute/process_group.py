"""Several processes, one run: torchrun --nproc-per-node N run_experiment.py ... --exp one

Rank 0 is the run: it alone holds the lock, writes, evaluates, decides, and owns the optimizer. Each
step the other ranks get the parameters, compute the gradients of their share of the batch and send
them back. Why not DistributedDataParallel: it needs an optimizer, a scaler, generators and a signal
handler that agree on every rank, and a checkpoint that is everybody's; here there is one copy of
each, so no two ranks can disagree, and as many bytes move as in an all-reduce. Sums are taken in
the order of the ranks' tree, so bits depend on their number: a run goes on with as many processes
as it was begun with.

torch is imported only when a group is joined.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from src.spec.command_line import TRY_AGAIN
from src.spec.config import RunConfig

if TYPE_CHECKING:
    import torch

# The others wait while rank 0 evaluates on the dev windows and saves; a dead process is noticed at
# once, by its closed connection, and not by this.
PATIENCE = timedelta(hours=2)


class PeerLost(Exception):
    """Another process of this run is gone; nothing is lost since the last checkpoint."""


def size() -> int:
    """How many processes this run has, as torchrun says; ValueError where it says half of it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # other launchers set WORLD_SIZE for themselves
        return 1
    variables = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    for name, value in variables.items():
        if not value.isdecimal():
            raise ValueError(f"{name}: found {value!r}, expected torchrun to set it to a number")
    return int(variables["WORLD_SIZE"])


def check(runs: Sequence[RunConfig] | None) -> None:
    """Refuse, before torch is imported, what several processes cannot do; None: a study."""
    processes = size()
    if processes == 1:
        return
    if runs is None or len(runs) != 1:
        what = "a study" if runs is None else f"{len(runs)} runs"
        raise ValueError(
            f"torchrun: found {processes} processes for {what}, expected one run (one --exp, one "
            "--seed); start the runs one after the other, or one process for all of them"
        )
    batch = runs[0].training.batch_size
    if batch % processes:
        raise ValueError(
            f"torchrun: found {processes} processes, expected a divisor of training.batch_size "
            f"({batch} sequences), so that each has an equal share"
        )


@dataclass
class ProcessGroup:
    """The processes of one run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    stop: bool = False  # whether a process was signalled, known to rank 0 after each step
    ended: bool = False

    @classmethod
    @contextlib.contextmanager
    def join(cls, device: str) -> Iterator[ProcessGroup]:
        """Meet the other processes, and leave them at the end; rank 0 then shuts down who is left.

        `device` is --device; auto or cuda is one GPU each. Raises PeerLost.
        """
        processes = size()
        import torch
        import torch.distributed as dist

        from src.compute import runtime

        local = int(os.environ["LOCAL_RANK"])
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{local}"  # not the least used: NCCL wants another for each process
        chosen = runtime.choose_device(device)
        rank = int(os.environ["RANK"])
        with _peers():
            store, _, _ = next(dist.rendezvous("env://", rank, processes, timeout=PATIENCE))
            # torchrun keeps its store when it starts all again (torch 2.13), with the addresses of
            # the processes that are gone in it; without a prefix they would be called.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
                store=dist.PrefixStore(f"attempt-{attempt}", store),
                rank=rank,
                world_size=processes,
                timeout=PATIENCE,
            )
        group = cls(rank, processes, chosen)
        try:
            yield group
        finally:
            if rank == 0:  # where it has not been said how it ended: by an exception
                group.shut_down(TRY_AGAIN)
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's rows of a batch."""
        rows = len(batch) // self.size
        return batch[self.rank * rows : (self.rank + 1) * rows]

    def announce(self, *message: Any) -> None:
        """Rank 0: say what comes next to all others."""
        self._pass_on([message])

    def receive(self) -> tuple[Any, ...]:
        """The others: what comes next."""
        box: list[Any] = [None]
        self._pass_on(box)
        return tuple(box[0])

    def _pass_on(self, box: list[Any]) -> None:
        import torch
        import torch.distributed as dist

        with _peers():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))

    def broadcast(self, parameters: Sequence[torch.Tensor]) -> None:
        """Make every process's `parameters` rank 0's."""
        import torch
        import torch.distributed as dist

        flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
        with _peers():
            dist.broadcast(flat, src=0)
        if self.rank:
            with torch.no_grad():
                for parameter, part in _cut(flat, parameters):
                    parameter.copy_(part)

    def reduce(
        self, parameters: Sequence[torch.Tensor], loss: torch.Tensor, stop: bool
    ) -> torch.Tensor:
        """Rank 0's gradients and loss become the sums over all processes; returns the loss.

        `stop`: whether this process was signalled; rank 0 then finds `self.stop` true.
        """
        import torch
        import torch.distributed as dist

        gradients = [parameter.grad for parameter in parameters]
        assert all(gradient is not None for gradient in gradients)
        tail = torch.stack((loss, torch.tensor(float(stop), device=loss.device)))
        flat = torch.cat([*(g.flatten() for g in gradients if g is not None), tail])
        with _peers():
            dist.reduce(flat, dst=0)
        if self.rank == 0:
            for parameter, part in _cut(flat, parameters):
                parameter.grad = part
            self.stop = bool(flat[-1] > 0)
        return flat[-2]

    def shut_down(self, code: int) -> None:
        """Rank 0: let the others end with `code`; once, and also when they are gone already."""
        if not self.ended:
            self.ended = True
            with contextlib.suppress(PeerLost):
                self.announce("end", code)


def _cut(
    flat: torch.Tensor, like: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor of `like` with its part of `flat`, in its shape."""
    start = 0
    for tensor in like:
        yield tensor, flat[start : start + tensor.numel()].view_as(tensor)
        start += tensor.numel()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """What a backend raises when a process is gone, as PeerLost."""
    try:
        yield
    except RuntimeError as error:  # gloo's own, and torch.distributed's DistError
        raise PeerLost(f"another process of this run is gone: {str(error)[:200]}") from error
