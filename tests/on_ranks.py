"""What the ranks of tests/test_distributed.py do, and a pool of processes that do it (started once a module).

Processes are forked from a server that has imported torch: starting one by one costs seconds each.
"""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import dvi
from dvi.methods import GradientDescent
from dvi.problems import DerivativeError, digits, fashion, sorting
from dvi.problems.catalogue.data import make_sorting
from dvi.problems.catalogue.tasks import cross_entropy
from dvi.problems.networks.by_name import sequence_network
from dvi.solvers.eigen.block_method import CriticalSubspace
from dvi.solvers.eigen.tracker import EigenTracker
from dvi.storage import hdf5

D = torch.float64
EXPECTED = (dvi.ProblemError, dvi.RanksError, dvi.RunError, dvi.StoreError, TypeError, ValueError)


def context():
    """Where processes come from."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "torch.distributed", "dvi"])
    return server


#: In place of a number of ranks: a group of two that is broken by the test that uses it.
SPARE = -2


class Pool:
    """Processes of one gloo group, which stay and take one job after the other."""

    def __init__(self, size, folder):
        server = context()
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = server.Pipe()
            arguments = (rank, size, str(folder / "store"), theirs)
            process = server.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def __call__(self, size, job, *args):
        """What ``job(group, *args)`` gives on each of the first ``size`` ranks; an exception is given back, too."""
        for pipe in self.pipes:
            pipe.send((size, job, args))
        found = []
        for pipe in self.pipes:
            assert pipe.poll(300), "a rank does not answer"
            found.append(pipe.recv())
        return found[: 2 if size == SPARE else size]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(60)
            assert process.exitcode == 0


def start(rank, size, store, seconds=60):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", datetime.timedelta(seconds=seconds), size, rank)


def _serve(rank, size, store, pipe):
    start(rank, size, store)
    groups = {n: dist.new_group(list(range(n))) for n in range(1, size + 1)}
    groups[SPARE] = dist.new_group([0, 1])
    while (task := pipe.recv()) is not None:
        n, job, args = task
        result = None
        if rank < (2 if n == SPARE else n):
            try:
                result = job(groups[n], *args)
            except EXPECTED as error:
                result = error
        pipe.send(result)
    dist.destroy_process_group()


# ---- problems -------------------------------------------------------------------------------------------


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def penalty(parameters):
    return 0.01 * parameters["0.weight"].square().sum().sin()


def small(examples=slice(None), loss="mse", reduction="mean", dtype=D, n=23, seed=0, **options):
    """A network of 53 weights on some of its 23 examples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    inputs = normal(n, 6, seed=1).to(dtype)
    targets = normal(n, 3, seed=2).to(dtype)
    criterion = nn.MSELoss(reduction=reduction)
    if loss == "ce":
        criterion, targets = nn.CrossEntropyLoss(reduction=reduction), targets.argmax(1)
    return dvi.Problem.from_module(model, criterion, inputs[examples], targets[examples], **options)


def ends(sizes):
    """The slice of each rank's examples."""
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def catalogue(name):
    """A problem of the catalogue, by the name of its network."""
    if name in ("mlp", "cnn"):
        return digits(name, n=7, classes=3)
    if name in ("rnn", "transformer"):
        return sorting(name, n=7)
    if name in ("lstm", "mamba"):  # smaller than any size that has a name
        model = sequence_network(name, "small", 4, 15, 8, width=4, depth=1)
        return dvi.Problem.from_module(model, cross_entropy, *make_sorting(7))
    return fashion(name, n=7, classes=2)


def derivatives(problem):
    """Everything that is asked of a problem near w0, by name."""
    w = problem.w0 + 0.05 * normal(problem.dim, seed=3).to(problem.w0)
    U = normal(problem.dim, 3, seed=4).to(problem.w0) / problem.dim**0.5
    value, gradient = problem.value_and_grad(w)
    return {
        "value alone": problem.value(w),
        "value": value,
        "gradient": gradient,
        "product": problem.hvp(w, U),
        "pairs": problem.hessian_gradient(w, U),
        "squares": problem.hessian_gradient(w, U, squares=True),
        "contraction": problem.hessian_gradient_of(w, U, torch.diag(torch.tensor([1.0, -2.0, 0.5]))),
        "along": problem.hessian_derivative(w, U, U[:, :1]),
    }


# ---- jobs -----------------------------------------------------------------------------------------------


def evaluate(group, options, sizes=None):
    """Derivatives, ledger and fingerprints of the small network, sharded by the library or (sizes) by the user."""
    rank = dist.get_rank(group)
    if sizes is None:
        problem = dvi.distribute(small(**options), group)
    else:
        problem = dvi.distribute(small(ends(sizes)[rank], **options), group, shards=True)
    found = derivatives(problem)
    return found, problem.ledger.counts, problem.fingerprints(), problem.examples


def fingerprints_in_pieces(group):
    """As of data that are too large to be sent at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvi.problems.distributed.ranks.PIECE", 64)
        return dvi.distribute(small(), group).fingerprints()


def amended(problem):
    return problem.penalised(0.3).negated().starting_at(problem.w0 + 0.1)


def evaluate_amended(group):
    return derivatives(amended(dvi.distribute(small(), group)))


def distribute_amended(group):
    return dvi.distribute(amended(small()), group)


def draw_of_distributed(group):
    return dvi.distribute(small(), group).mini_batches()


def evaluate_catalogue(group, name):
    problem = dvi.distribute(catalogue(name), group)
    return {key: value for key, value in derivatives(problem).items() if key in ("gradient", "product", "contraction")}


def parts():
    """A loss of four parts that is no module's."""
    A = normal(4, 5, seed=5)
    return dvi.Problem([lambda w, a=a: (a @ w).sin() + (w**4).sum() / 24 for a in A], normal(5, seed=6))


def evaluate_parts(group):
    return derivatives(dvi.distribute(parts(), group))


def term(rank):
    return dvi.Problem(lambda w: ((rank + 1) * w).sin().sum(), normal(5, seed=6))


def evaluate_terms(group):
    return derivatives(dvi.distribute(term(dist.get_rank(group)), group, shards=True))


def distribute_small(group, by_rank, shards=False, **options):
    """Hand over a small network that is made with other options on each rank."""
    return dvi.distribute(small(**options, **by_rank[dist.get_rank(group)]), group, shards=shards).dim


def distribute_weighted(group, shards):
    """Cross-entropy with weights of classes: no mean over examples."""
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 30.0], dtype=D))
    model = nn.Linear(6, 3).to(D)
    nn.init.zeros_(model.weight)  # where all examples have the same loss, which hides their weights
    nn.init.zeros_(model.bias)
    mine = ends([11, 12])[dist.get_rank(group)] if shards else slice(None)
    targets = normal(23, 3, seed=2).argmax(1)
    problem = dvi.Problem.from_module(model, criterion, normal(23, 6, seed=1)[mine], targets[mine])
    return dvi.distribute(problem, group, shards=shards).dim


def distribute_one_part(group):
    return dvi.distribute(dvi.Problem(lambda w: w.sin().sum(), normal(5)), group)


class Graph(nn.Module):
    """A layer on a graph: nodes and edges, no list of examples."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 0.5, dtype=D))

    def forward(self, nodes, edges):
        return (nodes[edges[0]] * nodes[edges[1]]).tanh() @ self.weight


def distribute_structure(group):
    edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
    problem = dvi.Problem.from_module(Graph(), lambda out: out.square().mean(), (normal(4, 3), edges))
    return dvi.distribute(problem, group)


def twice(group):
    problem = dvi.distribute(small(), group)
    return dvi.distribute(problem, group)


def pickled(group):
    import copy
    import pickle

    problem = dvi.distribute(small(), group)
    same = copy.deepcopy(problem)
    assert torch.equal(same.value_and_grad(same.w0)[1], problem.value_and_grad(problem.w0)[1])
    return pickle.dumps(problem)


def failing(group, kind):
    """Rank 1 alone cannot compute a product, once its loss is in the mood for it."""
    moody = []

    def loss(w):
        if moody:
            raise kind("out of luck")
        return w.sin().sum()

    problem = dvi.distribute(dvi.Problem(loss, normal(5, seed=6)), group, shards=True)
    if problem.ranks.rank == 1:
        moody.append(True)
    return problem.hvp(problem.w0, torch.eye(problem.dim, 2, dtype=D))


def overflowing(group):
    """The gradient overflows on rank 1 alone."""
    problem = dvi.distribute(term_that_overflows(dist.get_rank(group)), group, shards=True)
    return problem.value_and_grad(torch.full_like(problem.w0, 1e3))


def term_that_overflows(rank):
    return dvi.Problem(lambda w: ((1.0 if rank else 1e-4) * w).exp().sum(), normal(5, seed=6))


def wrong_on_one(group):
    """The gradient is wrong on rank 1 alone, which its own check finds."""

    def loss(w):
        return (w**2).sum() + ((w.detach() ** 2).sum() if dist.get_rank(group) else 0)

    dvi.distribute(dvi.Problem(loss, normal(5, seed=6)), group, shards=True).check()


def kinked_on_one(group):
    def loss(w):
        return (w.abs() if dist.get_rank(group) else w**2).sum()

    problem = dvi.distribute(dvi.Problem(loss, normal(5, seed=6)), group, shards=True)
    problem.check()
    return problem.kinks_between(problem.w0, -problem.w0)


def off_by_an_ulp(group, where):
    """Rank 1 asks with other weights, directions or state than the others, in one last bit."""
    problem = dvi.distribute(small(), group)
    w, V = problem.w0.clone(), torch.eye(problem.dim, 2, dtype=D)
    changed = {"weights": w, "directions": V, "state": w, "clock": w.clone()}[where]
    if problem.ranks.rank == 1:
        flat = changed.view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(9.0, dtype=D))
    return _asked(problem, w, V, where)


def exchanged(group, where):
    """Rank 1 asks with the first two weights, or the first two rows of the directions, in each other's place."""
    problem = dvi.distribute(small(), group)
    w, V = problem.w0.clone(), torch.eye(problem.dim, 2, dtype=D)
    changed = V if where == "directions" else w
    if problem.ranks.rank == 1:
        changed[[0, 1]] = changed[[1, 0]]
    return _asked(problem, w, V, where)


def negated(group, where):
    """Rank 1 asks with the other sign of one number, which changes its highest bit alone."""
    problem = dvi.distribute(small(), group)
    w, V = problem.w0.clone(), torch.eye(problem.dim, 2, dtype=D)
    changed = V.view(-1) if where == "directions" else w
    if problem.ranks.rank == 1:
        changed[0] = -changed[0]
    return _asked(problem, w, V, where)


def _asked(problem, w, V, where):
    if where == "weights":
        return problem.value_and_grad(w)
    if where == "directions":
        return problem.hvp(problem.w0, V)
    t = float(np.nextafter(1.0, 1.0 + problem.ranks.rank)) if where == "clock" else 1.0
    return problem.ranks.agree({"w": w, "t": t}, "at t = 1")


def late(group):
    """Rank 1 does not come within the timeout, which is shortened by what torch has no public name for."""
    problem = dvi.distribute(small(), group)
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1), group)
    if problem.ranks.rank == 1:
        return None
    return problem.value_and_grad(problem.w0)


def same_numbers(group):
    """What each machine measures for itself."""
    problem = dvi.distribute(small(derivatives="finite-difference"), group)
    return problem.measure_weights(repeats=1), problem.uncertainty()


SHARP = dvi.MacroStep(watch=EigenTracker(CriticalSubspace(tol=1e-9)))


def race(problem, steps, path=None, resume=False, **options):
    options = {"runs": ("discrete", "central"), "warm_start": 10, "eigen_every": 0, "integrator": SHARP} | options
    return dvi.compare(
        problem, GradientDescent(0.3), steps, path=path, resume=resume, check=False, progress=False, **options
    )


def race_on_ranks(group, steps, path=None, resume=False, **options):
    found = race(dvi.distribute(digits(n=101, width=8), group), steps, path, resume, **options)
    return found.central.w, found.discrete.w, found.central.breakpoints, found.central.ledger.ledger.counts


def race_with_files_apart(group, folder):
    """Each rank gives another path: only that of rank 0 counts."""
    path = Path(folder) / f"rank{dist.get_rank(group)}.h5"
    return race(dvi.distribute(small(), group), 3, path, integrator=None).status


def spoilt(group, folder):
    """A path that rank 0 cannot write to."""
    return race(dvi.distribute(small(), group), 3, folder)


def doomed(rank, size, store, path, steps, victim, gradient):
    """A process of a run, which is killed at a gradient if it is the victim; says how it ended by its exit code."""
    start(rank, size, store, seconds=30)
    hdf5.time = SimpleNamespace(monotonic=lambda: 0.0)  # no clock decides when the file is written: at every unit
    problem = dvi.distribute(digits(n=101, width=8))
    inner, gradients = problem.value_and_grad, itertools.count(1)

    def watched(*given, **named):
        if rank == victim and next(gradients) == gradient:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*given, **named)

    problem.value_and_grad = watched
    try:
        race(problem, steps, path, True, checkpoint_every=0.0)
    except dvi.RunError as error:
        raise SystemExit(3 if error.status is dvi.Status.RANKS else 4) from None
    except dvi.RanksError:
        raise SystemExit(3) from None


__all__ = ["DerivativeError", "Pool"]
