"""Several processes, each with some of the examples, are one: the same derivatives, steps, files and errors."""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import on_ranks
import pytest
import torch
import torch.distributed as dist
from live_memory import measured, swept
from on_ranks import Pool, catalogue, context, derivatives, ends, parts, race, small, term

import dvi
from dvi.methods import GradientDescent

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")), reason="needs gloo"
)

D = torch.float64


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Pool(3, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def equal(found):
    """What all ranks have found, which must be the same bits."""
    for other in found:
        assert not isinstance(other, Exception), other
        assert other.keys() == found[0].keys()
        assert all(torch.equal(x, y) for x, y in zip(other.values(), found[0].values(), strict=True))
    return found[0]


def words(found, kind):
    """The message of the error that every rank has raised."""
    assert all(type(error) is kind for error in found), found
    return [str(error) for error in found]


# ---- derivatives ----------------------------------------------------------------------------------------

KINDS = [
    {},
    {"reduction": "sum", "weight_decay": 0.3},
    {"loss": "ce", "penalty": on_ranks.penalty, "chunk_size": 4},
    {"loss": "ce", "reduction": "sum", "weight_decay": 0.1, "chunk_size": 3},
    {"derivatives": "mixed", "weight_decay": 0.1, "penalty": on_ranks.penalty},
    {"derivatives": "finite-difference", "chunk_size": 6},
    {"dtype": torch.float32, "weight_decay": 0.2},
]


def tolerances(problem, gradient):
    """By how much each derivative may be off.

    Sums of 23 examples in another order differ by a few eps of their size.  Differences magnify that of the gradient:
    by 1/h for products (h = ½ eps^½) and by 4/h² for contractions (h = ½ eps^¼), times √2 and a sum of three for pairs.
    """
    eps = torch.finfo(problem.dtype).eps
    sums, noise = 30 * eps, 10 * eps**0.5 * float(gradient.norm())
    products = noise if problem.derivatives == "finite-difference" else 0.0
    third = 0.0 if problem.derivatives == "autodiff" else 30 * noise
    return {"product": (sums, products)} | dict.fromkeys(("pairs", "squares", "contraction", "along"), (sums, third))


def compare(problem, found):
    exact = derivatives(problem)
    allowed = tolerances(problem, exact["gradient"])
    for name, value in exact.items():
        relative, absolute = allowed.get(name, (30 * torch.finfo(problem.dtype).eps, 0.0))
        off = float((found[name] - value).norm())
        assert off <= relative * float(value.norm()) + absolute, (name, off, float(value.norm()))


@pytest.mark.parametrize(("kind", "size"), [(0, 1), *itertools.product(range(len(KINDS)), (2, 3))])
def test_derivatives_are_those_of_one_process(ranks, kind, size):
    """With shares that the library makes, and with shares of random sizes that the user makes."""
    options = KINDS[kind]
    one = small(**options)
    rng = np.random.default_rng([kind, size])
    cuts = np.sort(rng.choice(np.arange(1, 23), size - 1, replace=False)) if size > 1 else []
    sizes = np.diff([0, *cuts, 23]).tolist()
    for given in (None, sizes):
        found = ranks(size, on_ranks.evaluate, options, given)
        assert not any(isinstance(result, Exception) for result in found), found
        compare(one, equal([result[0] for result in found]))
        assert all(result[2] == one.fingerprints() for result in found)  # of all examples, however many ranks
        own = [result[3] for result in found]
        assert sum(own) == 23
        assert own == sizes if given else max(own) - min(own) <= 1


def test_data_are_told_by_their_bytes_in_whatever_pieces_they_come(ranks):
    assert ranks(3, on_ranks.fingerprints_in_pieces) == [small().fingerprints()] * 3


def test_the_comparison_can_fail(ranks):
    """A penalty that counts twice, or shares that do not weigh n_r/n, would be seen."""
    one = small(weight_decay=0.1)
    found = ranks(2, on_ranks.evaluate, {"weight_decay": 0.1}, [5, 18])[0][0]
    first, second = (derivatives(small(examples, weight_decay=0.1)) for examples in ends([5, 18]))
    compare(one, found)
    with pytest.raises(AssertionError):
        compare(one, {name: (first[name] + second[name]) / 2 for name in first})


def test_a_penalty_that_is_added_later_counts_once(ranks):
    compare(on_ranks.amended(small()), equal(ranks(3, on_ranks.evaluate_amended)))


def test_what_would_count_once_for_every_rank_is_refused(ranks):
    assert "distribute the problem first" in words(ranks(2, on_ranks.distribute_amended), dvi.ProblemError)[0]
    assert "in one process" in words(ranks(2, on_ranks.draw_of_distributed), dvi.ProblemError)[0]


def test_collectives_are_few_and_large(ranks):
    """One for a gradient, one for a block, one for all third derivatives; each with as many bytes as it has numbers."""
    d = small().dim
    for derived in ("autodiff", "finite-difference"):
        _, counts, _, _ = ranks(2, on_ranks.evaluate, {"derivatives": derived})[0]
        assert counts["collectives"] == 7
        # value; gradient, value and a mark of w; 3 products and a mark; 6 pairs, 3 squares, 1 contraction; 3 × 3
        assert counts["collective_bytes"] == 8 * (1 + (d + 2) + (3 * d + 1) + 6 * d + 3 * d + d + 9)
    one = small()
    derivatives(one)
    assert one.ledger.collectives == one.ledger.collective_bytes == 0


NETWORKS = ["mlp", "cnn", "cnn-pool", "resnet", "resnet-groupnorm", "vit", "rnn", "lstm", "transformer", "mamba"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_catalogue(ranks, name):
    one = derivatives(catalogue(name))
    for key, value in equal(ranks(2, on_ranks.evaluate_catalogue, name)).items():
        # kernels of another batch size add in another order, in every layer
        assert float((value - one[key]).norm()) <= 1e-12 * float(one[key].norm()), key


def test_a_plain_loss_is_shared_by_its_parts(ranks):
    compare(parts(), equal(ranks(3, on_ranks.evaluate_parts)))


def test_each_rank_may_have_a_term_of_the_loss(ranks):
    whole = dvi.Problem(lambda w: sum(((rank + 1) * w).sin().sum() for rank in range(3)), term(0).w0)
    compare(whole, equal(ranks(3, on_ranks.evaluate_terms)))


# ---- right or refused -----------------------------------------------------------------------------------


def test_without_a_process_group():
    with pytest.raises(dvi.RanksError, match="torchrun --nproc-per-node N"):
        dvi.distribute(small())


REFUSED = {
    "other weights": ([{}, {"seed": 1}], False, "rank 1 has another w0 .* torch.manual_seed"),
    "other data": ([{}, {"examples": slice(0, 22)}], False, "rank 1 has other inputs .* shards=True"),
    "the same shards": ([{}, {}], True, "all have passed the same"),
    "another backend": ([{}, {"derivatives": "mixed"}], False, "another problem .*mixed derivatives.* than rank 0"),
    "a mean and a sum": (
        [{"examples": slice(0, 9)}, {"examples": slice(9, 23), "reduction": "sum"}],
        True,
        "on some ranks the loss is a mean",
    ),
    "single examples": ([{"examples": slice(0, 1)}, {"examples": slice(1, 2)}], True, "single example"),
    "fewer examples than ranks": ([{"examples": slice(0, 1)}] * 2, False, "1 examples cannot be shared among 2 ranks"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_together_is_refused_on_all_ranks(ranks, what):
    by_rank, shards, message = REFUSED[what]
    for found in words(ranks(2, on_ranks.distribute_small, by_rank, shards), dvi.ProblemError):
        assert re.search(message, found), found


@pytest.mark.parametrize("shards", [False, True])
def test_a_loss_that_is_no_mean_over_examples_is_refused(ranks, shards):
    for found in words(ranks(2, on_ranks.distribute_weighted, shards), dvi.ProblemError):
        assert "shared among ranks" in found
        assert "chunk_size" not in found


def test_a_plain_loss_of_one_part_is_refused(ranks):
    for found in words(ranks(2, on_ranks.distribute_one_part), dvi.ProblemError):
        assert "a loss of 1 parts cannot be shared among 2 ranks" in found


def test_data_that_are_no_list_of_examples_are_refused(ranks):
    for found in words(ranks(2, on_ranks.distribute_structure), dvi.ProblemError):
        assert "shards=True" in found


def test_distributed_twice_is_refused_and_a_copy_shares_its_group(ranks):
    assert "distributed over 2 ranks already" in words(ranks(2, on_ranks.twice), dvi.ProblemError)[0]
    assert "call dvi.distribute there" in words(ranks(2, on_ranks.pickled), TypeError)[0]


# ---- errors and differences -----------------------------------------------------------------------------


def test_an_error_of_one_rank_is_raised_on_all(ranks):
    first, second = words(ranks(2, on_ranks.failing, dvi.DerivativeError), dvi.DerivativeError)
    assert first == "out of luck\n(on rank 1 of 2)"
    assert second == "out of luck"
    first, second = ranks(2, on_ranks.failing, ValueError)  # which is no error of a loss
    assert isinstance(first, dvi.RanksError)
    assert "rank 1 of 2 cannot continue: ValueError: out of luck" in str(first)
    assert type(second) is ValueError


def test_a_loss_that_overflows_on_one_rank_has_overflown_on_all(ranks):
    for found in words(ranks(3, on_ranks.overflowing), dvi.problems.NotFiniteError):
        assert "is inf" in found


def test_each_rank_checks_its_part(ranks):
    first, second = words(ranks(2, on_ranks.wrong_on_one), dvi.DerivativeError)
    assert "the gradient is off" in first
    assert "(on rank 1 of 2)" in first
    assert "the gradient is off" in second


def test_kinks_of_one_rank_are_kinks_of_the_loss(ranks):
    assert ranks(2, on_ranks.kinked_on_one) == [True, True]


@pytest.mark.parametrize("where", ["weights", "directions", "state", "clock"])
def test_ranks_that_differ_in_a_last_bit_are_found_out(ranks, where):
    for found in words(ranks(2, on_ranks.off_by_an_ulp, where), dvi.RanksError):
        assert "do not have the same weights" in found


@pytest.mark.parametrize("where", ["weights", "directions", "state"])
@pytest.mark.parametrize("how", [on_ranks.exchanged, on_ranks.negated])
def test_ranks_with_the_same_numbers_in_other_places_or_of_other_sign_are_found_out(ranks, how, where):
    for found in words(ranks(2, how, where), dvi.RanksError):
        assert "do not have the same weights" in found


def test_a_rank_that_does_not_answer_ends_the_others(ranks):
    first, second = ranks(on_ranks.SPARE, on_ranks.late)
    assert isinstance(first, dvi.RanksError)
    assert "has not answered within the timeout" in str(first)
    assert second is None


def test_measurements_are_those_of_the_first_rank(ranks):
    """They differ from machine to machine, and decide steps."""
    found = ranks(3, on_ranks.same_numbers)
    assert found[0] == found[1] == found[2]
    assert set(found[0][1]) == {"hvps", "third_derivatives"}


# ---- runs -----------------------------------------------------------------------------------------------


def one_process(steps, **options):
    return race(dvi.problems.digits(n=101, width=8), steps, **options)


@pytest.mark.slow
def test_a_run_through_two_breakpoints_is_that_of_one_process(ranks):
    """100 steps, two directions arrive.  Eigenvectors are sharp, so that what is left is rounding."""
    one = one_process(100)
    assert [kind for _, kind, _ in one.central.breakpoints] == ["enter", "enter"]
    found = ranks(2, on_ranks.race_on_ranks, 100)
    for w, discrete, breakpoints, counts in found:
        assert torch.equal(w, found[0][0])
        assert float((w - one.central.w).norm()) <= 1e-9
        assert float((discrete - one.discrete.w).norm()) <= 1e-9
        assert [t for t, *_ in breakpoints] == pytest.approx([t for t, *_ in one.central.breakpoints], abs=1e-9)
        same = {kind: n for kind, n in counts.items() if not kind.startswith("collective")}
        assert same.items() <= one.central.ledger.ledger.counts.items()


def test_rank_0_keeps_the_file_and_another_number_of_ranks_goes_on(ranks, tmp_path):
    assert ranks(2, on_ranks.race_with_files_apart, str(tmp_path)) == [dvi.Status.SUCCESS] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0.h5"]
    path = tmp_path / "race.h5"
    found = ranks(2, on_ranks.race_on_ranks, 8, str(path), True)
    assert not any(isinstance(result, Exception) for result in found), found
    one_process(12, path=path, resume=True)
    whole = one_process(16)
    for w, *_ in ranks(3, on_ranks.race_on_ranks, 16, str(path), True):
        assert float((w - whole.central.w).norm()) <= 1e-9
    assert dvi.load(path).status is dvi.Status.SUCCESS
    assert len(dvi.load(path).t) == len(whole.t)


def test_a_path_that_cannot_be_written_to_ends_all_ranks(ranks, tmp_path):
    first, second = ranks(2, on_ranks.spoilt, str(tmp_path))
    assert isinstance(first, dvi.StoreError)
    assert isinstance(second, dvi.RanksError)
    assert "rank 0 of 2 cannot continue: StoreError" in str(second)
    assert "is a folder" in str(second)


STEPS = 60


def killed(tmp_path, victim, gradient):
    """Start a run on two ranks, or go on; one is killed at some gradient of its; how the other ended."""
    path, store = tmp_path / "race.h5", tmp_path / f"store{victim}-{gradient}"
    server = context()
    arguments = (2, str(store), path, STEPS, victim, gradient)
    processes = [server.Process(target=on_ranks.doomed, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode is not None, "a rank hangs"
    return path, [processes[rank].exitcode for rank in (victim, 1 - victim)]


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_loses_nothing(tmp_path):
    """At random gradients, one after the other on the same file; then one process finishes the run."""
    moments = np.random.default_rng(int(os.environ.get("DVI_SEED", "0")))
    recorded = []
    for turn in range(int(os.environ.get("DVI_KILLS", "2"))):
        path, exits = killed(tmp_path, victim=turn % 2, gradient=int(moments.integers(40, 70)))
        assert exits == [-signal.SIGKILL, 3]
        race = dvi.load(path)
        assert race.status in (dvi.Status.RUNNING, dvi.Status.RANKS)
        recorded.append(len(race.t))
    assert 0 < recorded[0] < recorded[-1] < STEPS
    assert recorded == sorted(recorded)
    finished = one_process(STEPS, path=tmp_path / "race.h5", resume=True)
    assert finished.status is dvi.Status.SUCCESS
    assert float((finished.central.w - one_process(STEPS).central.w).norm()) <= 1e-9


def test_variables_of_another_launcher_do_not_silence_one_process(monkeypatch):
    from dvi.runs.launched import first

    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert first()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not first()


@pytest.mark.slow
def test_the_shell_command_under_torchrun(tmp_path):
    """Two ranks, one file, one summary; one process then goes on."""
    arguments = ["compare", "--problem", "digits-mlp", "--method", "gd", "--lr", "0.3", "--problem.n", "50"]
    arguments += ["--width", "4", "--runs", "discrete", "central", "--no-plot", "--out", str(tmp_path / "x")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dvi"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *arguments, "--steps", "5"], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["race.h5"]
    from dvi.cli import main

    assert main([*arguments, "--steps", "8", "--resume", "--quiet"]) == 0
    race = dvi.load(tmp_path / "x" / "race.h5")
    assert len(race.t) == 9
    whole = dvi.compare(
        dvi.problems.digits(n=50, width=4), GradientDescent(0.3), 8, runs=("discrete", "central"), progress=False
    )
    assert np.abs(race.central.loss - whole.central.loss).max() <= 1e-9


# ---- memory ---------------------------------------------------------------------------------------------


def formula():
    """The function on the page."""
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    namespace = {"print": lambda *_: None}
    exec(re.search(r"^def vectors.*?(?=^```)", page, re.MULTILINE | re.DOTALL)[0], namespace)
    return namespace["vectors"]


@pytest.mark.parametrize(
    ("d", "k", "kind"),
    [(10_000, 4, "finite-difference"), (10_000, 4, "mixed"), (10_000, 7, "autodiff"), (100_000, 4, "autodiff")],
)
def test_a_run_holds_as_many_vectors_as_the_page_says(d, k, kind):
    """Tensors that are alive, in vectors of w's length; the search for directions may take fewer than is said."""
    found, vectors = measured(*swept(d, k, kind)), formula()
    assert max(found) == k
    for directions, held in found.items():
        assert held <= 1.03 * vectors(directions), (directions, held)  # small matrices and numbers lie beside
        if directions >= 4:  # one frame less where no step was tried again
            frame = directions * (directions + 3) // 2
            assert held >= 0.95 * (vectors(directions) - frame), (directions, held)
