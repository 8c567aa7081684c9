"""Situations from public bug reports, where a folder of them lies beside the project: each file prints PASS or FAIL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT.parent / "shared" / "cases"
FILES = sorted(FOLDER.glob("[0-9]*.py"))


@pytest.mark.skipif(not FILES, reason="there is no folder of situations beside the project")
@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_situations(path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.stdout.startswith("PASS "), run.stdout + run.stderr[-2000:]
