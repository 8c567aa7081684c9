"""A problem over several processes: each has some of the examples (``torch.distributed``)."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch.distributed as dist

from dvi.problems.distributed.ranks import Group
from dvi.problems.errors import ProblemError, RanksError
from dvi.problems.examples import SHARED, refuse_different
from dvi.problems.fingerprint import fingerprint
from dvi.problems.ledger import Ledger
from dvi.problems.problem import Problem

P = TypeVar("P", bound=Problem)


def distribute(problem: P, process_group: Any = None, *, shards: bool = False) -> P:
    """Return the problem over all ranks of a process group: each rank computes with its own examples.

    Every rank must call this function, and all later functions of the library, with the same arguments.  Loss,
    gradient, Hessian-vector products and third derivatives are summed over ranks, with one ``all_reduce`` for each
    gradient, block of products or batch of third derivatives.  The weights w [d] and all results are the same on every
    rank.

    A problem made from a module is split by its examples, in order.  If its loss is a mean, rank r has the weight
    n_r / n.  A penalty and weight decay count once.  Any other problem is split by the parts of its sum.

    Args:
        problem: made on every rank.  It is not changed.
        process_group: of ``torch.distributed``; by default all processes.
        shards: True if ``problem`` has only this rank's examples (or its term of a sum), those of rank 0 first.  By
            default it has all of them, the same on every rank, and each rank keeps a part.

    Raises:
        RanksError: if ``torch.distributed`` has not been started, or if another rank fails.
        ProblemError: on all ranks, if they do not have the same weights, if their data do not fit together, or if the
            loss is neither a sum nor a mean over examples.

    """
    if not dist.is_available() or not dist.is_initialized():
        raise RanksError(
            "there is no process group: start the program with torchrun --nproc-per-node N, and call "
            "torch.distributed.init_process_group() before dvi.distribute"
        )
    if problem.ranks.size > 1:
        raise ProblemError(f"{problem.name} is distributed over {problem.ranks.size} ranks already")
    if problem.changes:
        raise ProblemError(
            f"{problem.name} was penalised or negated before it was distributed, so each rank would count that once: "
            "distribute the problem first, then call penalised() or negated() of the result"
        )
    twin = copy.copy(problem)
    ranks = Group(process_group, Ledger())
    own = problem.fingerprints() | {
        "w0": fingerprint(problem.w0),
        "settings": f"{problem.name}, {problem.derivatives} derivatives, {problem.dtype}",
    }
    every = ranks.gather(own)
    data = [name for name in own if name in ("inputs", "targets")]
    fixed = [name for name in own if name not in data]
    with ranks.together():
        for name in fixed if shards else own:
            for other, found in enumerate(every):
                if found.get(name) != every[0].get(name):
                    raise ProblemError(_different(name, other, found.get(name), every[0].get(name)))
        if shards and data and ranks.size > 1 and all(found == every[0] for found in every):
            raise ProblemError(
                "with shards=True each rank must pass its own examples, but all have passed the same. Leave shards "
                "out, and each rank will keep a part of them"
            )
    twin._parts, twin._ranks = tuple(twin._shard(ranks, whole=not shards)), ranks
    twin._begin()
    ranks.ledger = twin.ledger
    with twin.ledger.paused(), problem.ledger.paused():
        twin._value_at_w0 = float(twin.value(twin.w0))
        if not shards:
            at = ranks.share(problem._near)
            refuse_different(float(twin.value(at)), float(problem.value(at)), SHARED)
    return twin


def _different(name: str, rank: int, there: str | None, here: str | None) -> str:
    """The difference between two ranks in words, and the remedy."""
    if name == "settings":
        return f"rank {rank} has another problem ({there}) than rank 0 ({here}): make the same one on every rank"
    if name in ("inputs", "targets"):
        return (
            f"rank {rank} has other {name} than rank 0. If each rank has passed its own examples, set shards=True; "
            "otherwise let every rank read the same data in the same order"
        )
    return (
        f"rank {rank} has another {name} than rank 0. Call torch.manual_seed with the same number on every rank before "
        "the model is made, or load the same weights into it"
    )
