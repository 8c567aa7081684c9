"""The tables of the suite on the page are those of its results, and each family is of one kind."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def rows(name):
    return json.loads((ROOT / "benchmarks" / name).read_text())["rows"]


def test_the_page_shows_the_suite_as_it_ran(script):
    suite = script("suite")
    kept = rows("suite.json")
    table = [line for line in suite.table(kept, "mixed") if line.startswith("|")]
    assert not [line for line in table if line not in PAGE]
    for families in (suite.NOT_CHOSEN_ON, suite.CHOSEN_ON):
        assert any(suite.summary([r for r in kept if r["case"] in families]) in line for line in PAGE)
    wrong = [{**row, "GE": row["GE"] + 1} for row in kept]
    assert [line for line in suite.table(wrong, "mixed") if line.startswith("|") and line not in PAGE]  # it can fail


def test_every_family_and_seed_has_run_and_none_is_of_both_kinds(script):
    suite = script("suite")
    assert not set(suite.NOT_CHOSEN_ON) & set(suite.CHOSEN_ON)
    done = {(row["case"], row["seed"]) for row in rows("suite.json")}
    assert done >= {(name, seed) for name, seeds in suite.SEEDS.items() for seed in seeds}


def test_the_page_shows_the_errors_as_they_were_measured(script):
    errors = script("errors")
    assert not [line for line in errors.table(rows("errors.json")) if line not in PAGE]
