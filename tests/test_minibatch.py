"""Gradients of single examples and of batches: against torch's own one by one, in chunks, counted; what is refused."""

import pytest
import torch
from torch import nn

import dvi
from dvi.methods import GradientDescent
from dvi.problems import CNN, GPT, MLP, RNN, ProblemError
from dvi.problems.catalogue.data import load_digits, make_sorting
from dvi.problems.catalogue.tasks import cross_entropy, squared_error


def marked(n):
    """Digits and one-hot targets."""
    images, labels = load_digits(n)
    return images, nn.functional.one_hot(labels, 10).double()


MODELS = {
    "mlp": (lambda: MLP([64, 5, 10]), squared_error, lambda: marked(12)),
    "mlp, cross-entropy": (lambda: MLP([64, 5, 10]), cross_entropy, lambda: load_digits(12)),
    "cnn": (lambda: CNN(1, 10, 2), squared_error, lambda: marked(8)),
    "transformer": (lambda: GPT(4, 7, 4, width=12, depth=1, heads=2), cross_entropy, lambda: make_sorting(8, 4)),
    "rnn": (lambda: RNN(4, 4, width=6), cross_entropy, lambda: make_sorting(8, 4)),
    "chunks": (lambda: MLP([64, 5, 10]), squared_error, lambda: marked(12)),
}


def alone(model, criterion, x, y):
    """The loss of one example and its gradient, by torch.autograd on the model itself."""
    loss = criterion(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), torch.cat([g.reshape(-1) for g in gradients])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_examples_are_those_of_each_alone(name):
    make, criterion, data = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
    x, y = data()
    problem = dvi.Problem.from_module(model, criterion, x, y, chunk_size=5 if name == "chunks" else None)
    losses, G = (torch.cat(parts) for parts in zip(*problem.mini_batches().each(problem.w0), strict=True))
    value, g = problem.value_and_grad(problem.w0)
    # sums of some thousand products, in another order
    torch.testing.assert_close(losses.mean(), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(G.mean(dim=0), g, rtol=0, atol=1e-12)
    for i in (0, 5):
        one, gradient = alone(model, criterion, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(losses[i], one, rtol=1e-12, atol=0)
        torch.testing.assert_close(G[i], gradient, rtol=0, atol=1e-12)


def test_memory_is_bounded_and_chunks_change_nothing():
    problem = dvi.problems.digits(n=40, width=5)
    gib = 4 * 7 * problem.dim * 8 / 2**30  # seven examples at a time
    whole = [torch.cat(parts) for parts in zip(*problem.mini_batches().each(problem.w0), strict=True)]
    pieces = list(problem.mini_batches(gib).each(problem.w0))
    assert [len(losses) for losses, _ in pieces] == [7] * 5 + [5]
    for a, b in zip(whole, zip(*pieces, strict=True), strict=True):
        torch.testing.assert_close(a, torch.cat(b), rtol=0, atol=1e-13)


def test_batches_have_weights_of_their_own():
    problem = dvi.problems.digits(n=20, width=4)
    batches, n = problem.mini_batches(), 20
    W = torch.stack([problem.w0, 0.5 * problem.w0, problem.w0 + 0.1])
    chosen = torch.arange(n).expand(3, n)
    losses, G = batches.batches(W, chosen)
    for w, loss, g in zip(W, losses, G, strict=True):
        known, gradient = problem.value_and_grad(w)
        torch.testing.assert_close(loss, known, rtol=1e-12, atol=0)
        torch.testing.assert_close(g, gradient, rtol=0, atol=1e-12)


def test_what_is_added_to_the_loss_is_in_every_batch():
    model, x, y = nn.Linear(3, 1).double(), torch.randn(6, 3).double(), torch.randn(6, 1).double()
    problem = dvi.Problem.from_module(model, nn.MSELoss(), x, y, weight_decay=0.7)
    bare = dvi.Problem.from_module(model, nn.MSELoss(), x, y)
    (_, with_decay), (_, without) = (next(p.mini_batches().each(p.w0)) for p in (problem, bare))
    torch.testing.assert_close(with_decay - without, (0.7 * problem.w0).expand(6, -1), rtol=0, atol=1e-14)


def test_all_examples_once_are_one_gradient():
    problem = dvi.problems.digits(n=20, width=4)
    batches = problem.mini_batches()
    problem.ledger.reset()
    list(batches.each(problem.w0))
    assert problem.ledger.counts["gradients"] == 1
    for step in range(10):  # 4 replicas of 5: a whole gradient each
        batches.batches(problem.w0.repeat(4, 1), torch.arange(20).view(4, 5))
        assert problem.ledger.counts["gradients"] == 2 + step
    batches.batches(problem.w0[None], torch.arange(5)[None])
    assert problem.ledger.counts["gradients"] == 11  # what is spent of the next is kept


def test_a_loss_that_torch_cannot_vectorise_is_taken_one_by_one():
    x = torch.linspace(-1, 1, 6).double()

    def losses(w, x):
        scale = 2.0 if float(w.detach().sum()) > -100 else 1.0  # control flow on data, which vmap refuses
        return scale * 0.5 * (w[0] * x - w[1]) ** 2

    problem = dvi.Problem.from_examples(losses, x, torch.tensor([0.3, 0.2], dtype=torch.float64))
    (_, G) = next(problem.mini_batches().each(problem.w0))
    r = 2.0 * (0.3 * x - 0.2)
    torch.testing.assert_close(G, torch.stack([r * x, -r], dim=1), rtol=1e-12, atol=1e-15)


def test_a_module_is_left_with_plain_weights():
    problem = dvi.problems.digits(n=10, width=4)
    list(problem.mini_batches().each(problem.w0 + 1))
    problem.check()  # uses the module again
    problem.outputs(problem.w0, load_digits(10)[0])


# ---- what is refused ------------------------------------------------------------------------------------


def module(*layers, criterion=None, targets=None):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double()
    y = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)).double() if targets is None else targets
    return dvi.Problem.from_module(nn.Sequential(*layers).double(), criterion or nn.MSELoss(), x, y)


def test_a_loss_without_examples_is_refused():
    problem = dvi.Problem(lambda w: w.square().sum(), torch.ones(2).double())
    with pytest.raises(ProblemError, match=r"from_module.*from_examples"):
        problem.mini_batches()


def test_batch_norm_in_training_mode_is_refused_by_name():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    with pytest.raises(ProblemError, match=r"module 1 \(BatchNorm1d\).*model.eval\(\)"):
        module(nn.Linear(4, 4), norm, nn.Linear(4, 2)).mini_batches()


def test_batch_norm_in_evaluation_mode_is_fine():
    model = [nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)]
    assert module(*model).mini_batches().n == 8


def test_a_sum_is_refused():
    with pytest.raises(ProblemError, match='reduction="mean"'):
        module(nn.Linear(4, 2), criterion=nn.MSELoss(reduction="sum")).mini_batches()


def test_examples_of_unequal_weight_are_refused():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1])  # the first three count the same
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]).double())
    with pytest.raises(ProblemError, match="count the same"):
        module(nn.Linear(4, 2), criterion=criterion, targets=labels).mini_batches()


def test_examples_that_see_one_another_are_refused():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(dim=0)

    with pytest.raises(ProblemError, match="do not affect one another"):
        module(nn.Linear(4, 2), Centred()).mini_batches()


def test_losses_that_are_no_list_of_examples_are_refused():
    with pytest.raises(ProblemError, match="one loss for each of the 5 examples"):
        dvi.Problem.from_examples(lambda w, x: (w * x).sum(), torch.ones(5).double(), torch.ones(5).double())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 11}, "10 examples to draw without replacement"),
        ({"batch_size": 3, "epochs": True}, "does not divide the 10 examples.*batch_size=2"),
        ({"batch_size": 2, "replacement": True, "epochs": True}, "Choose one of the two"),
        ({"batch_size": 2, "replicas": 0}, "replicas must be a whole number"),
        ({"batch_size": 2, "window": -1}, "window must be positive"),
        ({"batch_size": 2, "pairs": "some"}, 'pairs.*or "all"'),
        ({"batch_size": 2, "window": "wide"}, "must be a number"),
    ],
)
def test_a_wrong_setting_is_refused_in_words(settings, words):
    problem = dvi.problems.digits(n=10, width=4)
    with pytest.raises(ValueError, match=words):
        dvi.minibatch(problem, GradientDescent(0.1), **settings)
