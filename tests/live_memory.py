"""How many bytes of tensors are alive, at most, while a flow is integrated."""

from __future__ import annotations

import weakref

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dvi


class Live(TorchDispatchMode):
    """Watches all storages that operations make, in the forward and in the backward pass.

    Attributes:
        now: bytes of those that are alive.
        peak: the most there were since :meth:`rewind`.
    """

    def __init__(self, beside=()):
        super().__init__()
        self.now = self.peak = 0
        self.known = {id(x.untyped_storage()): x.untyped_storage() for x in beside}

    def rewind(self):
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._meet(x.untyped_storage())
        return out

    def _meet(self, storage):
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return
        self.known[key] = weakref.ref(storage, lambda _: self._leave(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _leave(self, key, size):
        del self.known[key]
        self.now -= size


class Watched:
    """An integrator beside which the peak of every step is written down, with the number k of critical directions."""

    def __init__(self, live, integrator):
        self.live, self.integrator, self.peaks = live, integrator, []

    def init(self, flow, y):
        return self.integrator.init(flow, y)

    def step(self, flow, memory, y, h):
        self.live.rewind()
        result = self.integrator.step(flow, memory, y, h)
        self.peaks.append((result.node.k, self.live.peak))
        return result

    def __getattr__(self, name):
        return getattr(self.integrator, name)


def swept(d, k, derivatives="autodiff", dtype=torch.float64):
    """A loss of d weights of which one direction after the other becomes critical, up to k; it holds no memory itself.

    Returns:
        the problem, its learning rate, how many steps that takes, and what it reads.
    """
    sweep = dvi.problems.MatrixSweep([1.0] * k, [0.5 * (i + 1) for i in range(k)], 0.1, dtype=dtype)
    frame = torch.randn(d, sweep.problem.dim, dtype=dtype, generator=torch.Generator().manual_seed(0))
    frame = torch.linalg.qr(frame)[0].T.contiguous()
    return (
        dvi.Problem(lambda w: sweep.loss(frame @ w), torch.zeros(d, dtype=dtype), derivatives=derivatives),
        0.1,
        5 * k + 6,
        [frame],
    )


def measured(problem, lr, steps, beside):
    """The largest number of vectors of w's length that a run holds at once, by k.

    A step that ends with more directions than it began with counts for its end.
    """
    with Live(beside) as live:
        watched = Watched(live, dvi.MacroStep())
        flow = dvi.central_flow(problem, dvi.methods.GradientDescent(lr), check=False)
        dvi.solve(flow, steps, integrator=watched, progress=False)
    vectors = {}
    ends = [k for k, _ in watched.peaks[1:]] + [0]
    for (begin, peak), end in zip(watched.peaks, ends, strict=True):
        k = max(begin, end)
        vectors[k] = max(vectors.get(k, 0.0), peak / problem.w0.nbytes)
    return vectors


__all__ = ["measured", "swept"]
