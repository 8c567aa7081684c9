"""Inputs and outputs as people have them: mappings, structures, data sets, outputs with names, losses inside models."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import dvi
from dvi.methods import GradientDescent
from dvi.problems import Problem, ProblemError

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, Z, Y = normal(7, 3), normal(7, 3, seed=2), normal(7, 2, seed=1)
Outputs = namedtuple("Outputs", ["hidden", "logits"])


class Named(nn.Module):
    """A model with named arguments, whose output has several forms."""

    def __init__(self, form="tensor"):
        super().__init__()
        self.a, self.b, self.form = nn.Linear(3, 2), nn.Linear(3, 2), form

    def forward(self, x, z, labels=None, scale=1.0):
        hidden = torch.tanh(self.a(x))
        logits = hidden + scale * self.b(z).sin()
        if self.form == "tensor":
            return logits
        if self.form == "dict":
            return {"logits": logits, "hidden": hidden}
        if self.form == "loss":
            return {"loss": F.mse_loss(logits, labels), "logits": logits}
        return Outputs(hidden, logits)


def named(form="tensor"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Named(form).to(F64)


def same(problem, reference=None):
    """The derivatives of this problem are those of the one that is made with positional tensors."""
    reference = reference or Problem.from_module(named(), F.mse_loss, (X, Z), Y)
    w, U = reference.w0 + 0.3, normal(reference.dim, 2)
    assert torch.allclose(problem.value_and_grad(w)[1], reference.value_and_grad(w)[1], rtol=1e-12)
    assert torch.allclose(problem.hessian_gradient(w, U), reference.hessian_gradient(w, U), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_arguments_by_name(mapping, chunk_size):
    inputs = mapping({"z": Z, "x": X})
    problem = Problem.from_module(named(), F.mse_loss, inputs, Y, chunk_size=chunk_size)
    same(problem)
    race = dvi.compare(problem, GradientDescent(0.5), 3, test_inputs={"x": X[:2], "z": Z[:2]}, progress=False)
    assert np.allclose(race.discrete.series["outputs"][0], named()(X[:2], Z[:2]).detach())


def test_numbers_among_the_arguments():
    same(
        Problem.from_module(named(), F.mse_loss, {"x": X, "z": Z, "scale": 1.0}, Y),
    )


@pytest.mark.parametrize(
    ("form", "output"), [("dict", "logits"), ("tuple", 1), ("tuple", "logits"), ("dict", lambda o: o["logits"])]
)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_part_of_the_output(form, output, chunk_size):
    problem = Problem.from_module(named(form), F.mse_loss, (X, Z), Y, chunk_size=chunk_size, output=output)
    same(problem)
    assert problem.outputs(problem.w0, (X, Z)).shape == Y.shape
    problem.output_curvature(problem.w0, (X, Z), normal(problem.dim, 1), torch.eye(1, dtype=F64))
    problem.check()


@pytest.mark.parametrize(
    ("form", "output"), [("dict", "logit"), ("tuple", 2), ("tuple", "logit"), ("tensor", "logits")]
)
def test_a_part_that_is_not_there(form, output):
    with pytest.raises(ProblemError, match=r"output='?\w+'? is not in the model's output"):
        Problem.from_module(named(form), F.mse_loss, (X, Z), Y, output=output)


def test_a_criterion_of_the_outputs_alone():
    targets = Y
    same(Problem.from_module(named(), lambda out: F.mse_loss(out, targets), (X, Z)))


def test_a_model_that_computes_its_loss_itself():
    inputs = {"x": X, "z": Z, "labels": Y}
    same(Problem.from_module(named("loss"), None, inputs))
    whole = Problem.from_module(named("loss"), None, inputs, chunk_size=3)
    same(whole)
    with pytest.raises(ProblemError, match=r"without a criterion the model must return its loss.*pass a criterion"):
        Problem.from_module(named("dict"), None, (X, Z))


class Graph(nn.Module):
    """A graph convolution: nodes [n, 3], edges [2, m], and how nodes are pooled."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, nodes, edges):
        h = self.a(nodes)
        messages = torch.zeros_like(h).index_add(0, edges[1], torch.tanh(h[edges[0]]))
        return (h + messages).tanh()


EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 2], [1, 2, 3, 4, 5, 6, 0, 3, 5]])


@dataclass
class Sample:
    nodes: torch.Tensor
    edges: torch.Tensor


class Opened(Graph):
    def forward(self, sample):
        return super().forward(sample.nodes, sample.edges)


def graph(make=Graph):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().to(F64)


def test_graphs():
    first = Problem.from_module(graph(), F.mse_loss, (X, EDGES), Y)
    model = graph()
    F.mse_loss(model(X, EDGES), Y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(first.value_and_grad(first.w0)[1], gradient, rtol=1e-12)
    first.check()
    same(Problem.from_module(graph(Opened), F.mse_loss, Sample(X, EDGES), Y), first)
    with pytest.raises(ProblemError, match=r"taken in chunks.*no number of inputs and 7 targets"):
        Problem.from_module(graph(), F.mse_loss, (X, EDGES), Y, chunk_size=2)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, nodes, adjacency):
        return adjacency @ self.a(nodes)


def test_chunks_of_what_is_no_list_of_examples_are_refused():
    adjacency = (normal(7, 7) > 0).to(F64)
    with pytest.raises(ProblemError, match="must treat examples one by one, but it fails on a few of them"):
        Problem.from_module(graph(Dense), F.mse_loss, (X, adjacency), Y, chunk_size=3)
    one = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).to(F64)
    with pytest.raises(ProblemError, match="fails on a few of them: Expected more than 1 value"):
        Problem.from_module(one, F.mse_loss, X, Y, chunk_size=3)


def test_settings_among_the_arguments_are_for_all_chunks():
    inputs = {"x": X, "z": Z, "scale": 1.0, "labels": None}
    same(Problem.from_module(named(), F.mse_loss, inputs, Y, chunk_size=3))


def test_examples_that_count_for_more_than_others_show_in_any_form_of_output():
    labels = torch.tensor([0, 1, 0, 1, 1, -1, -1])
    criterion = lambda out, y: F.cross_entropy(out["logits"], y, ignore_index=-1)  # noqa: E731
    with pytest.raises(ProblemError, match="some examples count for more than others"):
        Problem.from_module(named("dict"), criterion, (X, Z), labels, chunk_size=4)
    Problem.from_module(named("dict"), criterion, (X, Z), labels)


# ---- data sets and loaders ------------------------------------------------------------------------------


class Pairs(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return {"x": X[i], "z": Z[i], "labels": Y[i]}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(F64)


TENSORS = TensorDataset(X, Y)


@pytest.mark.parametrize(
    "source",
    [
        lambda: TENSORS,
        lambda: DataLoader(TENSORS, batch_size=3),
        lambda: DataLoader(TENSORS, batch_size=3, shuffle=True, drop_last=True),
        lambda: DataLoader(Stream(), batch_size=3),
    ],
)
def test_data_sets_and_loaders_are_read_once_in_order(source):
    state = torch.get_rng_state()
    problem = Problem.from_module(linear(), F.mse_loss, source())
    assert torch.equal(torch.get_rng_state(), state)
    same(problem, Problem.from_module(linear(), F.mse_loss, X, Y))


def test_a_data_set_of_mappings():
    same(Problem.from_module(named("loss"), None, DataLoader(Pairs(), batch_size=2)))


def test_sources_that_are_refused():
    weighted = DataLoader(TENSORS, batch_size=2, sampler=WeightedRandomSampler([1.0] * 7, 7))
    ragged = DataLoader([(X[0], Y[0]), (X[0][:2], Y[0])], batch_size=1)
    for source, options, message in [
        (DataLoader(TENSORS), {"targets": Y}, "holds its targets itself"),
        (weighted, {}, "WeightedRandomSampler of its own"),
        (ragged, {}, "do not fit together"),
        (TensorDataset(X, Z, Y), {}, "these have 3 parts"),
    ]:
        with pytest.raises(ProblemError, match=message):
            Problem.from_module(linear(), F.mse_loss, source, **options)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (X.numpy(), r"got ndarray: torch.from_numpy"),
        ({"x": X, "z": Z.numpy()}, r"an ndarray among them: torch.from_numpy"),
        ([X, Z], r"got a list: write tuple"),
        (3.0, "got float"),
    ],
)
def test_inputs_that_are_none(inputs, message):
    with pytest.raises(ProblemError, match=message):
        Problem.from_module(named(), F.mse_loss, inputs, Y)
