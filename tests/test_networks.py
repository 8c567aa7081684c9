"""The paper's networks: their weights, what they compute, where they begin, and their derivatives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dvi.problems import GPT, LSTM, PoolingCNN, Problem, ProblemError, ResNet, ViT, fashion, sorting
from dvi.problems.catalogue.data import make_sorting
from dvi.problems.networks.by_name import SIZES, image_network, sequence_network
from dvi.problems.networks.initial import initialise
from dvi.problems.networks.mamba import causal_convolution, selective_scan
from dvi.problems.networks.vit import StdNorm, sinusoids

ROOT = Path(__file__).resolve().parents[1]
F64 = torch.float64
IMAGES = ["mlp", "cnn", "cnn-pool", "resnet", "resnet-groupnorm", "vit"]
SEQUENCES = ["transformer", "rnn", "lstm", "mamba"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem_of(name, loss="mse", **options):
    if name in IMAGES:
        return fashion(name, loss, n=4, classes=2, pixels=14, **options)
    return sorting(name, loss, n=4, length=4, **options)


def weights(model):
    return sum(p.numel() for p in model.parameters())


# ---- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "four", "ten"),
    [
        ("mlp", 853_508, 855_050),
        ("cnn-pool", 544_100, 544_874),
        ("resnet-groupnorm", 293_300, 294_842),
        ("vit", 661_412, 661_802),
    ],
)
def test_full_size_has_the_weights_of_the_paper(name, four, ten):
    """On CIFAR-10's 3×32×32 pictures with 4 and 10 classes."""
    assert weights(image_network(name, "full", 3, 32, 4)) == four
    assert weights(image_network(name, "full", 3, 32, 10)) == ten


def test_full_size_of_sequence_networks_has_the_weights_of_the_paper():
    """Alphabet 4; the transformer is minGPT's nano without the paper's leak, counted by hand."""
    assert weights(sequence_network("lstm", "full", 4, 15, 8)) == 38_020
    assert weights(sequence_network("mamba", "full", 4, 15, 8)) == 65_984
    width, depth, alphabet, context = 48, 3, 4, 15
    block = 2 * 2 * width + 4 * width**2 + 4 * width + 8 * width**2 + 5 * width
    by_hand = (alphabet + context) * width + depth * block + 2 * width + alphabet * width
    assert weights(sequence_network("transformer", "full", alphabet, context, 8)) == by_hand


def test_the_page_has_the_right_numbers():
    """The table of docs/networks.md."""
    page = (ROOT / "docs" / "networks.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert {name for name, _, _ in rows} == {*IMAGES, *SEQUENCES}
    for name, *shown in rows:
        if name in IMAGES:
            models = image_network(name, "full", 3, 32, 10), image_network(name, "small", 1, 28, 10)
        else:
            models = tuple(sequence_network(name, size, 4, 15, 8) for size in ("full", "small"))
        assert [f"{weights(model):,}" for model in models] == shown, name


def test_norm_free_resnet_has_twenty_layers():
    """App. B's: 3·3·2 convolutions in branches, the stem and the readout; shortcuts are not counted."""
    model = image_network("resnet", "full", 3, 32, 10)
    branches = [m for block in model.blocks for m in block.branch if isinstance(m, nn.Conv2d)]
    assert len(branches) + 2 == 20
    assert not any(isinstance(m, nn.GroupNorm) for m in model.modules())


def test_small_networks_are_small():
    for name in IMAGES:
        assert weights(image_network(name, "small", 1, 28, 10)) < 30_000
    for name in SEQUENCES:
        assert weights(sequence_network(name, "small", 4, 15, 8)) < 5_000
    assert set(SIZES) == {*IMAGES, *SEQUENCES}


def test_names_that_are_not_known():
    with pytest.raises(ProblemError, match=r"no network 'rnn' for images; there are mlp, cnn, .*vit"):
        fashion("rnn", n=4, classes=2)
    with pytest.raises(ProblemError, match="size is 'small' or 'full', not 'tiny'"):
        fashion("mlp", n=4, classes=2, size="tiny")
    with pytest.raises(ProblemError, match="'rnn' has no heads to set; it has width"):
        sorting("rnn", n=4, heads=2)
    with pytest.raises(ProblemError, match='only "transformer" takes an activation'):
        sorting("lstm", n=4, activation="gelu")
    with pytest.raises(ProblemError, match="a width that 4 divides"):
        ViT(1, 8, 2, width=6)
    with pytest.raises(ProblemError, match='norm is "group" or "none"'):
        ResNet(1, 2, norm="batch")
    with pytest.raises(ProblemError, match="halved twice"):
        PoolingCNN(1, 3, 2)


# ---- what they compute -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize(("channels", "pixels"), [(3, 32), (1, 28), (1, 14)])
def test_image_networks_take_these_pictures(name, channels, pixels):
    model = image_network(name, "small", channels, pixels, 3)
    assert model(normal(2, channels, pixels, pixels)).shape == (2, 3)


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_networks_are_causal(name):
    """A changed token changes the outputs from its position on, and none before."""
    length, changed_at = 5, 6
    tokens, _ = make_sorting(3, length)
    model = sequence_network(name, "small", 4, tokens.shape[1], length)
    changed = tokens.clone()
    changed[:, changed_at] = (changed[:, changed_at] + 1) % 4
    before, after = model(tokens), model(changed)
    assert before.shape == (3, length, 4)
    first = changed_at - (length - 1)  # outputs belong to the last positions, from length - 1 on
    assert torch.equal(before[:, :first], after[:, :first])
    assert all(not torch.equal(before[:, i], after[:, i]) for i in range(first, length))


def test_the_check_of_causality_can_fail():
    """Attention without a mask sees the future."""
    tokens, _ = make_sorting(3)
    model = GPT(4, 15, 8, width=8, depth=1, heads=2).to(F64)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 4
    attend = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, is_causal: attend(q, k, v))
        assert not torch.equal(model(tokens)[:, 0], model(changed)[:, 0])


def test_lstm_is_that_of_torch():
    model = LSTM(4, 3, width=5, depth=2).to(F64)
    initialise(model, 1)
    theirs = nn.LSTM(5, 5, num_layers=2, batch_first=True, dtype=F64)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            for ours, name in ((layer.input, "ih"), (layer.recurrent, "hh")):
                getattr(theirs, f"weight_{name}_l{i}").copy_(ours.weight)
                getattr(theirs, f"bias_{name}_l{i}").copy_(ours.bias)
    tokens = make_sorting(6, 3)[0]
    expected = model.readout(theirs(model.tokens(tokens))[0][:, -3:])
    assert torch.allclose(model(tokens), expected, rtol=1e-12, atol=1e-14)


def test_selective_scan_is_the_sum_over_the_past():
    """yₜ = Σ_{r≤t} Cₜ · exp(A (Δ_{r+1} + … + Δₜ)) Δᵣ Bᵣ xᵣ, the recurrence solved."""
    n, t, m, s = 2, 6, 3, 4
    x, B, C = normal(n, t, m), normal(n, t, s, seed=1), normal(n, t, s, seed=2)
    delta, A = normal(n, t, m, seed=3).exp(), -normal(m, s, seed=4).exp()
    elapsed = delta.cumsum(1)
    decay = (A * (elapsed[:, :, None] - elapsed[:, None, :])[..., None]).exp()  # [n, t, r, m, s]
    decay = decay * torch.ones(t, t, dtype=F64).tril()[None, :, :, None, None]
    expected = torch.einsum("nts,ntrms,nrm,nrs,nrm->ntm", C, decay, delta, B, x)
    assert torch.allclose(selective_scan(x, delta, A, B, C), expected, rtol=1e-12, atol=1e-14)


def test_causal_convolution_is_that_of_torch():
    x, kernel = normal(2, 7, 3), normal(4, 3, seed=1)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), kernel.T[:, None], groups=3).transpose(1, 2)
    assert torch.allclose(causal_convolution(x, kernel), expected, rtol=1e-12, atol=1e-14)


def test_the_paper_s_layer_norm():
    x = normal(3, 5)
    norm = StdNorm(5).to(F64)
    norm.weight.data, norm.bias.data = normal(5, seed=1), normal(5, seed=2)
    expected = norm.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + norm.bias
    assert torch.allclose(norm(x), expected, rtol=1e-13, atol=1e-14)


def test_vit_tells_places_but_not_the_order_of_patches_apart():
    """Without positions a permutation of the patches changes nothing: the mean over patches is symmetric."""
    model = ViT(1, 8, 3, patches=4, width=8, depth=2, heads=2, head_width=4, hidden=8).to(F64)
    initialise(model, 0)
    model.readout.weight.data = normal(3, 8)
    assert len({tuple(row.tolist()) for row in sinusoids(4, 8)}) == 16
    images = normal(2, 1, 8, 8)
    rolled = images.roll(2, dims=2)  # by one patch
    assert not torch.allclose(model(images), model(rolled), rtol=1e-3)
    model.positions.zero_()
    assert torch.allclose(model(images), model(rolled), rtol=1e-12)


def test_vit_cuts_squares():
    """Changing pixels of one patch changes what enters at its place only."""
    model = ViT(2, 8, 3, patches=4, width=8).to(F64)
    seen = []
    model.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = normal(1, 2, 8, 8)
    model(images)
    assert torch.equal(seen[0][0, 1 * 4 + 2], images[0, :, 2:4, 4:6].flatten())  # second row, third column


def test_a_patch_of_one_colour_has_derivatives():
    """Its standard deviation is zero, where the square root has a kink.  The embedding's norm must not see it."""
    model = ViT(1, 8, 2, patches=4, width=8, depth=1, heads=2, head_width=4, hidden=8).to(F64)
    initialise(model, 0)
    problem = Problem.from_module(model, F.mse_loss, torch.zeros(2, 1, 8, 8, dtype=F64), normal(2, 2))
    problem.check(problem.w0 + 0.05 * normal(problem.dim))


# ---- where they begin --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*IMAGES, *SEQUENCES])
def test_the_seed_alone_decides(name):
    state = torch.get_rng_state()
    first = problem_of(name, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    torch.set_default_device("meta")
    try:
        again = problem_of(name, seed=3, device="cpu")
    finally:
        torch.set_default_device(None)
    assert torch.equal(again.w0, first.w0)
    assert not torch.equal(problem_of(name, seed=4).w0, first.w0)
    assert torch.equal(problem_of(name, seed=3, dtype=torch.float32).w0, first.w0.float())


def test_residual_blocks_begin_as_their_shortcuts():
    x = normal(2, 4, 8, 8)
    for norm in ("group", "none"):
        model = ResNet(4, 3, width=4, blocks=2, norm=norm).to(F64)
        initialise(model, 0)
        block = model.blocks[1]
        assert not torch.count_nonzero(block.branch(x))
        assert torch.count_nonzero(block.branch[0].weight)
        assert not torch.count_nonzero(model(x))
        kernel = model.blocks[-1].branch[0].weight  # 16·16·9 = 2,304 draws: the deviation is known to 1.5 %
        assert kernel.std().item() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.06)


def test_initial_weights_of_the_others():
    vit = image_network("vit", "full", 3, 32, 4)
    assert not torch.count_nonzero(vit.readout.weight)
    assert vit.blocks[0].mlp[0].bias.abs().max().item() == pytest.approx(1 / 8, rel=0.05)
    assert not torch.count_nonzero(vit(normal(2, 3, 32, 32)))
    lstm = sequence_network("lstm", "full", 4, 15, 8)
    for parameter in lstm.layers.parameters():
        assert 0.95 < parameter.abs().max().item() * 48**0.5 <= 1
    mamba = sequence_network("mamba", "full", 4, 15, 8)
    block = mamba.blocks[0]
    steps = F.softplus(block.step.bias)
    assert 0.001 <= steps.min() < 0.002
    assert 0.05 < steps.max() <= 0.1
    assert torch.allclose(block.log_rates.exp()[5], torch.arange(1.0, 17.0, dtype=F64))
    assert block.enter.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mamba.readout.weight.std().item() == pytest.approx(0.002, rel=0.2)  # of 256


# ---- derivatives -------------------------------------------------------------------------------------------


def extrapolate(difference, h):
    """Remove the h² and h⁴ errors of a symmetric difference."""
    coarse, middle, fine = difference(2 * h), difference(h), difference(h / 2)
    first, second = (4 * middle - coarse) / 3, (4 * fine - middle) / 3
    return (16 * second - first) / 15


@pytest.mark.parametrize("name", [*IMAGES, *SEQUENCES])
def test_derivatives_of_all_backends(name):
    """Against differences of gradients, at weights where no layer is zero.

    Extrapolated differences are off by h⁶ = 3e-13, and by rounding of ε/h = 3e-14 and ε/h² = 3e-12 times the gradient,
    which is up to a hundred times the third derivative here.  The differences of the library are one-sided for H,
    √ε = 1.5e-8 times a third derivative along a direction of length 1; for T, ε^(1/4) squared and a constant.
    """
    problem = problem_of(name)
    w = problem.w0 + 0.05 * normal(problem.dim, seed=3)
    u = normal(problem.dim, seed=1)
    u /= u.norm()

    def gradient(x):
        return problem.value_and_grad(x)[1]

    def second(h):
        return (gradient(w + h * u) - gradient(w - h * u)) / (2 * h)

    def third(h):
        return (gradient(w + h * u) + gradient(w - h * u) - 2 * gradient(w)) / h**2

    H, T = problem.hvp(w, u), problem.hessian_gradient(w, u[:, None])[0]
    assert (H - extrapolate(second, 8e-3)).norm() < 1e-10 * H.norm()
    assert (T - extrapolate(third, 8e-3)).norm() < 1e-7 * T.norm()
    for backend in ("mixed", "finite-difference"):
        other = problem_of(name, derivatives=backend)
        assert (other.hvp(w, u) - H).norm() < 1e-5 * H.norm()
        assert (other.hessian_gradient(w, u[:, None])[0] - T).norm() < 1e-4 * T.norm()


@pytest.mark.parametrize("name", [*IMAGES, *SEQUENCES])
@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_problems_pass_the_check_where_they_begin(name, loss):
    problem_of(name, loss).check()


@pytest.mark.parametrize("name", [*IMAGES, *SEQUENCES])
def test_single_precision(name):
    problem, exact = problem_of(name, dtype=torch.float32), problem_of(name)
    w = exact.w0 + 0.05 * normal(exact.dim, seed=3)
    value, gradient = problem.value_and_grad(w.float())
    assert value.dtype == gradient.dtype == torch.float32
    reference = exact.value_and_grad(w)[1]
    # 1e-7 for each of some tens of layers, sums of a few hundred terms
    assert (gradient.double() - reference).norm() < 1e-4 * reference.norm()


@pytest.mark.parametrize("name", IMAGES)
def test_activation_can_be_chosen(name):
    inputs = normal(2, 1, 14, 14)
    found = []
    for activation in (None, "gelu", 1, 20):
        model = image_network(name, "small", 1, 14, 2, activation=activation)
        for i, parameter in enumerate(model.parameters()):
            parameter.data += 0.1 * normal(*parameter.shape, seed=i)
        found.append(model(inputs))
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[1], found[2], rtol=1e-10)  # β-GELU at β = 1
    assert not torch.allclose(found[1], found[3], rtol=1e-3)
