"""The stationary flow (eq. 13): closed forms, order, the CCP of eq. (25), and a network that reaches stationarity."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import dvi
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm
from dvi.stationarity.flow import TOL


def trough(y):
    """L = ½ s(z) x² + ¼ (u − 1)² − z + 0.1 z², s = 2 + z + ½ sin 2z: along x = 0 the sharpness is s(z)."""
    x, u, z = y
    s = 2 + z + 0.5 * torch.sin(2 * z)
    return 0.5 * s * x**2 + 0.25 * (u - 1) ** 2 - z + 0.1 * z**2


W0 = torch.tensor([0.0, 0.2, 0.3], dtype=torch.float64)


def s(z):
    return 2 + z + 0.5 * np.sin(2 * z)


def slope(z):
    return 1 + np.cos(2 * z)


def gradient(w):
    return np.array([0.0, 0.5 * (w[1] - 1), -1 + 0.2 * w[2]])


def rmsprop_norm(lr, beta2, penalty):
    """dw/dt of RMSProp-Norm's stationary flow on the trough, by hand: η/√ν̄ = 2/s, σ² of eq. (10)."""

    def rate(_, w):
        g, S = gradient(w), s(w[2])
        assert lr * S / 2 > np.linalg.norm(g)  # ν̄ is at the edge
        dS = np.array([0.0, 0.0, slope(w[2])])
        top = beta2 * -g @ dS + (1 - beta2) * (S**2 / 4 - g @ g / lr**2)
        sigma_sq = max(0.0, top / (beta2 * 0.5 * dS @ dS + (1 - beta2) * S**2 / lr**2))
        return -2 / S * (g + 0.5 * penalty * sigma_sq * dS)

    return rate


def rmsprop(lr, beta2):
    """The same for RMSProp: x is the only direction with curvature beyond its gradient, p₁ = s/2, pᵢ = |gᵢ|/η."""

    def rate(_, w):
        g, S, dS = gradient(w), s(w[2]), slope(w[2])
        p = np.array([S / 2, *np.abs(g[1:]) / lr])
        c = (1 - beta2) / beta2
        # C.5 in the unit vector along x: α = −T·P⁻¹g + c p₁, β = ½ T P⁻¹ T + c (4/η²) p₁
        alpha = dS * -g[2] / p[2] + c * p[0]
        beta = 0.5 * dS**2 / p[2] + c * 4 / lr**2 * p[0]
        sigma_sq = alpha / beta
        return -(g + np.array([0.0, 0.0, 0.5 * sigma_sq * dS])) / p

    return rate


CASES = {
    "RMSProp-Norm": (RMSPropNorm(1.5, 0.7), None, rmsprop_norm(1.5, 0.7, 1.0)),
    "RMSProp-Norm, ablated": (RMSPropNorm(1.5, 0.7), "curvature penalty", rmsprop_norm(1.5, 0.7, 0.0)),
    "RMSProp": (RMSProp(0.8, 0.9), None, rmsprop(0.8, 0.9)),
}


@pytest.mark.parametrize("name", CASES)
def test_against_an_equation_written_by_hand(name):
    method, without, rate = CASES[name]
    start = W0.clone()
    if name == "RMSProp":
        start[1] = -5.0  # far from u = 1, about which |g₂| has its kink
    flow = dvi.stationary_flow(dvi.Problem(trough, start), method, without=without)
    steps = 2
    exact = solve_ivp(rate, (0, steps), start.numpy(), rtol=1e-10, atol=1e-12).y[:, -1]
    errors = []
    for h in (0.5, 0.25):
        found = dvi.solve(flow, steps, integrator=dvi.Quasistatic(h), progress=False)
        errors.append(np.linalg.norm(found.w.numpy() - exact))
    assert errors[1] <= 0.02 * np.linalg.norm(exact - start.numpy())
    assert errors[0] / errors[1] > 2.8  # second order: 4, less where h is not small yet
    np.testing.assert_allclose(found.eigenvalues[:, 0], 2.0, atol=TOL)  # to which ν is settled
    assert all(len(X) == (without is None) for X in found.X)


def test_what_is_recorded_is_what_settles():
    """ν on the way is the stationary one; the loss falls at the recorded rate (Prop. 1, Fig. 10)."""
    flow = dvi.stationary_flow(dvi.Problem(trough, W0 - torch.tensor([0.0, 5.0, 0.0])), RMSProp(0.8, 0.9))
    run = dvi.solve(flow, 1, integrator=dvi.Quasistatic(0.125), save_every=0.125, progress=False)
    w = run.w.numpy()
    expected = np.array([0.8 * s(w[2]) / 2, *np.abs(gradient(w)[1:])]) ** 2
    np.testing.assert_allclose(run.nu["v"], expected, rtol=1e-5)
    seen = np.gradient(run.loss, run.t, edge_order=2)[1:-1]
    np.testing.assert_allclose(run.series["loss_rate"][1:-1], seen, rtol=5e-2)  # differences over 2/8
    lr = 3 / np.sqrt(expected).sum() * 0.8
    assert run.series["effective_lr"][-1] == pytest.approx(lr, rel=1e-5)


def test_the_penalty_leads_to_where_it_is_flatter():
    problem = dvi.Problem(trough, W0)
    runs = {
        without: dvi.solve(dvi.stationary_flow(problem, RMSProp(0.8, 0.9), without=without), 3, progress=False)
        for without in (None, "curvature penalty")
    }
    sharpness = {name: s(float(run.w[2])) for name, run in runs.items()}
    assert sharpness[None] < sharpness["curvature penalty"] - 0.1


def test_refusals():
    problem = dvi.Problem(trough, W0)
    with pytest.raises(dvi.SpecError, match="no ν"):
        dvi.stationary_flow(problem, GradientDescent(0.1))
    with pytest.raises(ValueError, match="curvature penalty"):
        dvi.stationary_flow(problem, RMSProp(0.1, 0.9), without="P")
    flow = dvi.stationary_flow(problem, RMSProp(0.1, 0.9))
    with pytest.raises(ValueError, match="Quasistatic"):
        dvi.solve(flow, 1, integrator=dvi.MacroStep(), progress=False)
    with pytest.raises(ValueError, match="not the central flow"):
        dvi.solve(dvi.central_flow(problem, RMSProp(0.1, 0.9)), 1, integrator=dvi.Quasistatic(), progress=False)
    with pytest.raises(ValueError, match="h must"):
        dvi.Quasistatic(2.0)


def test_nu_becomes_stationary_along_the_central_flow():
    """The cosine between ν and the stationary ν rises towards 1 (Fig. 8): digits, RMSProp."""
    problem = dvi.problems.digits(n=40, width=6, depth=1)
    flow = dvi.central_flow(problem, RMSProp(3e-3, 0.95), check=False)
    start, point, cosine = None, None, []
    for _ in range(4):
        run = dvi.solve(flow, 20, start=start, warm_start=0 if start else "auto", progress=False)
        start = dvi.State(run.w, run.nu, run.about["warm_start"] + 20 * (len(cosine) + 1))
        point = dvi.stationary(flow, run.w, start=point)
        assert dvi.duality(flow, point).gap <= 1e-6
        nu, settled = run.nu["v"], point.nu["v"]
        cosine.append(float(nu @ settled / nu.norm() / settled.norm()))
    assert all(np.diff(cosine) > 0)
    assert cosine[-1] > 0.98  # near 1 after 80 steps, where 1/(1 − β₂) = 20


def test_oscillation_that_holds_a_gradient_of_zero():
    """Where gᵢ = 0, eq. (26) says 1 = (4/η²) Σᵢᵢ, and the constraint pᵢ = Hᵢᵢ/2."""
    point = dvi.stationary(dvi.stable_flow(dvi.Problem(trough, W0), RMSProp(0.8, 0.9)))
    assert float(point.nu["v"][0]) == pytest.approx((0.8 * s(0.3) / 2) ** 2, rel=2e-6)
    assert float(point.covariance_diagonal[0]) == pytest.approx(0.8**2 / 4, rel=1e-6)
