"""Situations from public bug reports, where a folder of them lies beside the project: each file prints PASS or FAIL."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT.parent / "shared" / "cases"
FILES = sorted(FOLDER.glob("[0-9]*.py"))


def script(path, folder):
    """Run a file as python does, in a folder; what it prints goes into out.txt and err.txt there."""
    os.chdir(folder)
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o666), number)
    sys.argv = [str(path)]
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.skipif(not FILES, reason="there is no folder of situations beside the project")
@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_situations(path, tmp_path):
    """Each in a process of its own, forked from one that has imported torch, which takes as long as most of them."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "dvi"])
    process = server.Process(target=script, args=(path, tmp_path))
    process.start()
    process.join(600)
    process.kill()
    out, err = ((tmp_path / name).read_text() for name in ("out.txt", "err.txt"))
    assert out.startswith("PASS "), out + err[-2000:]
