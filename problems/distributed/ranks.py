"""The processes that compute a loss: one, or several that each have some of its examples.

Derivatives are linear in the loss.  Each rank differentiates its own examples, and one ``all_reduce`` outside autograd
sums the results.  Every rank computes the rest from the same sums, so all ranks take the same steps.  This is checked
along the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.problems.errors import DerivativeError, LossChangedError, NotFiniteError, ProblemError, RanksError
from dvi.problems.ledger import Ledger

T = TypeVar("T")

#: Errors that every rank raises in their own class.  Other errors are explained by the rank where they happened.
_COMMON = {kind.__name__: kind for kind in (ProblemError, DerivativeError, NotFiniteError, LossChangedError)}


class Ranks:
    """One process that has the whole loss: there is nothing to sum or compare.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.

    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """True for the process that prints and writes files."""
        return self.rank == 0

    def total(self, compute: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor, *same: Tensor) -> Tensor:
        """Return the sum over ranks of the results of ``compute``, as a new tensor, with one collective.

        An error of one rank is raised on all.

        Args:
            compute: this rank's term, a new tensor.
            shape: its shape.
            like: a tensor of its dtype and device.
            same: tensors that must be the same on all ranks, bit for bit; their checksum is sent along.

        Raises:
            RanksError: if these tensors differ, or if another rank has ended.

        """
        return compute()

    def value_and_gradient(self, compute: Callable[[], tuple[Tensor, Tensor]], w: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss [] and gradient [d] at w [d], summed as by :meth:`total` in one collective."""
        return compute()

    def gather(self, what: T) -> list[T]:
        """Return the objects of all ranks, on every rank; for small Python objects."""
        return [what]

    def share(self, make: Callable[[], T]) -> T:
        """Return on every rank the result of the first rank; all ranks raise its error, if any."""
        return make()

    @contextmanager
    def together(self) -> Iterator[None]:
        """In this context nothing is exchanged; an error of one rank is raised on all ranks at its end."""
        yield

    def agree(self, state: Any, where: str) -> None:
        """Check that all ranks have the same state (a pytree of tensors and plain data), bit for bit.

        Raises:
            RanksError: on all ranks, if they do not.

        """

    def in_turn(self, update: Callable[[bytes], None], mine: Tensor) -> None:
        """Pass the bytes [n] of all ranks to ``update`` on every rank, in the order of ranks."""
        update(mine.cpu().numpy().tobytes())

    def __deepcopy__(self, memo: Any) -> Ranks:
        """Itself: copies of a problem share the group of processes."""
        return self


ALONE = Ranks()

PIECE = 2**24  # bytes sent at a time to make a fingerprint of data

#: Numbers in one piece of a checksum: few beside a vector of weights on the host, and not many pieces on a GPU.
_MARKED_HOST, _MARKED_DEVICE = 2**12, 2**22


class Group(Ranks):
    """The processes of a group of ``torch.distributed``.

    Args:
        group: the process group; None for all processes.
        ledger: counts collectives and their bytes.

    """

    def __init__(self, group: Any, ledger: Ledger) -> None:
        self._group, self.ledger = group, ledger
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def total(self, compute: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor, *same: Tensor) -> Tensor:
        """See :meth:`Ranks.total`.  A rank that fails adds NaN, which informs the others without another message."""
        error: Exception | None = None
        try:
            mine = compute().contiguous()
        except Exception as caught:
            mine, error = like.new_full(shape, torch.nan), caught
        if same:  # small beside T rows, which are summed in place
            digits = {torch.float64: 53, torch.float32: 24}[like.dtype] - (self.size - 1).bit_length()
            mark = (_mark(same) % 2 ** min(digits, 40)).to(like)  # so small that a sum of as many is exact
            packed = torch.cat([mine.reshape(-1), mark])
            self._sum(packed)
            if not bool(packed[-1] == self.size * mark):
                raise self._differ("at an evaluation of the loss")
            mine = packed[:-1].view(shape)
        else:
            self._sum(mine)
        if not bool(torch.isfinite(mine).all()):  # on all ranks, since all have the same sum
            self._raise_common(error)
        return mine

    def value_and_gradient(self, compute: Callable[[], tuple[Tensor, Tensor]], w: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Ranks.value_and_gradient`."""

        def packed() -> Tensor:
            value, gradient = compute()
            return torch.cat([gradient, value[None]])

        both = self.total(packed, (len(w) + 1,), w, w)
        return both[-1], both[:-1]

    def gather(self, what: T) -> list[T]:
        """See :meth:`Ranks.gather`."""
        found: list[Any] = [None] * self.size
        with self._reached():
            dist.all_gather_object(found, what, group=self._group)
        return found

    def share(self, make: Callable[[], T]) -> T:
        """See :meth:`Ranks.share`."""
        made: list[Any] = [None]
        with self.together():
            if self.first:
                made = [make()]
        with self._reached():
            dist.broadcast_object_list(made, group=self._group, group_src=0)
        return made[0]  # type: ignore[no-any-return]

    @contextmanager
    def together(self) -> Iterator[None]:
        """See :meth:`Ranks.together`."""
        error: Exception | None = None
        try:
            yield
        except RanksError:
            raise
        except Exception as caught:
            error = caught
        self._raise_common(error)

    def agree(self, state: Any, where: str) -> None:
        """See :meth:`Ranks.agree`."""
        leaves = pytree.tree_leaves(state)
        mark = _mark([x for x in leaves if isinstance(x, Tensor)])
        mark = mark + crc32(repr([x for x in leaves if not isinstance(x, Tensor)]).encode())
        marks = [torch.empty_like(mark) for _ in range(self.size)]
        with self._reached():
            dist.all_gather(marks, mark, group=self._group)
        if len(set(torch.cat(marks).tolist())) > 1:
            raise self._differ(where)

    def in_turn(self, update: Callable[[bytes], None], mine: Tensor) -> None:
        """See :meth:`Ranks.in_turn`."""
        for source, length in enumerate(self.gather(len(mine))):
            for start in range(0, length, PIECE):
                stop = min(start + PIECE, length)
                piece = mine[start:stop].clone() if source == self.rank else mine.new_empty(stop - start)
                with self._reached():
                    dist.broadcast(piece, group=self._group, group_src=source)
                update(piece.cpu().numpy().tobytes())

    def _sum(self, x: Tensor) -> None:
        self.ledger.collectives += 1
        self.ledger.collective_bytes += x.numel() * x.element_size()
        with self._reached():
            dist.all_reduce(x, group=self._group)

    def _raise_common(self, error: Exception | None) -> None:
        """Raise the error of one rank on every rank."""
        mine = None if error is None else (type(error).__name__, type(error) in _COMMON.values(), str(error))
        for rank, found in enumerate(self.gather(mine)):
            if found is None:
                continue
            name, common, words = found
            if error is not None and (rank == self.rank or not common):
                raise error
            if common:
                raise _COMMON[name](f"{words}\n(on rank {rank} of {self.size})")
            raise RanksError(f"rank {rank} of {self.size} cannot continue: {name}: {words}")

    def _differ(self, where: str) -> RanksError:
        return RanksError(
            f"rank {self.rank} of {self.size} found {where} that the ranks do not have the same weights, so they are "
            "no longer one run. Rounding depends on processors, libraries and numbers of threads: start all ranks on "
            "machines of one kind, with the same torch and OMP_NUM_THREADS"
        )

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().split(". This ")[0].splitlines()  # the text after it is advice
            raise RanksError(
                f"rank {self.rank} of {self.size} cannot reach the others: one has ended, or has not answered within "
                "the timeout of the process group. Its last output is above or in its own log. A run with a file can "
                f"continue with resume=True, on any number of ranks ({reason[-1] if reason else error})"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled: another process belongs to other groups."""
        raise TypeError(
            "a problem that is distributed over ranks cannot be pickled: send the original problem, and call "
            "dvi.distribute there"
        )


def _mark(tensors: Iterable[Tensor]) -> Tensor:
    """A checksum [1] of the bits of tensors and of the place of each number; it is the same on every device.

    It is a sum of whole numbers that wrap, so the order of addition does not matter.  Numbers that change their places
    change the sum, and a change of any bit reaches its low bits, which are those that are sent.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    mark = torch.zeros(1, dtype=torch.int64)
    for x in tensors:
        real = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
        bits = real.contiguous().reshape(-1).view(kinds[real.element_size()])
        mark = 1_000_003 * mark.to(x.device)
        length = _MARKED_HOST if x.device.type == "cpu" else _MARKED_DEVICE
        for start in range(0, len(bits), length):
            mark = mark + _mixed(bits[start : start + length], start).sum(dtype=torch.int64)
    return mark


def _mixed(bits: Tensor, start: int) -> Tensor:
    """Whole numbers [n] that each depend on all bits of a number and on its place, counted from ``start``.

    This is the mixing function of SplitMix64 (Steele, Lea and Flood, 2014), whose shifts here repeat the sign.
    """
    mixed = torch.arange(start + 1, start + 1 + len(bits), dtype=torch.int64, device=bits.device)
    mixed.mul_(-0x61C8864680B583EB).add_(bits)  # 0x9E3779B97F4A7C15 as a signed number
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed.bitwise_xor_(mixed >> shift).mul_(factor)
    return mixed.bitwise_xor_(mixed >> 31)
