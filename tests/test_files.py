"""Paths that cannot be used: each is named in words, before the run, and no result is lost because of one."""

import errno
import functools
import os
import subprocess
import sys

import h5py
import pytest
import torch

import dvi
from dvi import cli
from dvi.methods import GradientDescent
from dvi.storage import files


class Counted:
    """L = ½(ab − 1)², and how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, w):
        self.calls += 1
        return 0.5 * (w[0] * w[1] - 1) ** 2

    def compare(self, steps=40, **options):
        problem = dvi.Problem(self, torch.tensor([1.1, 0.6], dtype=torch.float64))
        return dvi.compare(problem, GradientDescent(0.3), steps, progress=False, **options)


@pytest.fixture(scope="module")
def race():
    return Counted().compare(3)


def refuse(number):
    """A function that fails as the system would, for every path."""

    def failing(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return failing


def below_a_file(folder):
    (folder / "taken").write_text("a file")
    return folder / "taken" / "deep" / "race.h5", r"taken is a file, so nothing can lie below it.*another path"


def a_folder(folder):
    (folder / "runs").mkdir()
    return folder / "runs", r"runs is a folder.*runs/race\.h5"


def a_folder_to_be(folder):
    return f"{folder}/new/", r"new/ is a folder.*new/race\.h5"


def too_long(folder):
    return folder / ("x" * 300 + ".h5"), "shorter name"


UNUSABLE = {"below a file": below_a_file, "a folder": a_folder, "a folder to be": a_folder_to_be, "too long": too_long}


@pytest.mark.parametrize("make", UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_path_is_named_before_the_run(make, race, tmp_path):
    path, words = make(tmp_path)
    loss = Counted()
    with pytest.raises(dvi.StoreError, match=words):
        loss.compare(path=path)
    assert loss.calls <= 2  # those of Problem itself
    with pytest.raises(dvi.StoreError, match=words) as caught:
        race.save(path)
    with pytest.raises(dvi.StoreError, match=words):
        race.central.save(path)
    assert race.central.loss is caught.value.result.central.loss if caught.value.result else True
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


ERRORS = {errno.EACCES: "may not write", errno.EROFS: "read-only", errno.ENOSPC: "Free some space"}


@pytest.mark.parametrize("number", ERRORS)
def test_what_the_system_refuses_is_named_before_the_run(number, tmp_path, monkeypatch):
    """The tests may run as root, whom no permission stops, so the system's answer is put in its place."""
    loss = Counted()
    monkeypatch.setattr("builtins.open", refuse(number))
    with pytest.raises(dvi.StoreError, match=f"{os.strerror(number)}.*{ERRORS[number]}"):
        loss.compare(path=tmp_path / "race.h5")
    assert loss.calls <= 2


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="no permission stops root")
def test_a_folder_without_permission(race, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(dvi.StoreError, match="may not write"):
            race.save(tmp_path / "race.h5")
    finally:
        tmp_path.chmod(0o700)


def test_a_path_is_tried_without_a_trace(tmp_path):
    old = tmp_path / "race.h5"
    old.write_bytes(b"as it was")
    assert files.writable(old) == old
    assert files.writable(tmp_path / "new" / "no ending")
    assert old.read_bytes() == b"as it was"
    assert sorted(os.listdir(tmp_path)) == ["new", "race.h5"]
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize("place", [(h5py, "File"), (os, "replace"), (os, "fsync")], ids=lambda place: place[1])
@pytest.mark.parametrize("kind", ["comparison", "solution"])
def test_a_full_disk_keeps_the_older_file_and_the_result(kind, place, race, tmp_path, monkeypatch):
    result = race if kind == "comparison" else race.discrete
    path = tmp_path / "result.h5"
    result.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(*place, refuse(errno.ENOSPC))
    with pytest.raises(dvi.StoreError, match=r"No space left.*earlier is intact.*Free some space") as caught:
        result.save(path)
    assert caught.value.result is result
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["result.h5"]


@pytest.mark.parametrize("mode", ["r+", "w"])
def test_a_file_open_elsewhere_is_called_that(mode, race, tmp_path):
    path = tmp_path / "race.h5"
    race.save(path)
    program = f"import h5py, sys; f = h5py.File({str(path)!r}, {mode!r}); print('ok', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(dvi.StoreError, match="open for writing in another program") as caught:
            dvi.load(path)
        assert "truncated" not in str(caught.value)
        with pytest.raises(dvi.StoreError, match="open for writing in another program"):
            Counted().compare(3, path=path, resume=True)
    finally:
        holder.communicate()


def test_what_cannot_be_read_is_named(race, tmp_path, monkeypatch):
    with pytest.raises(dvi.StoreError, match="is a folder"):
        dvi.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(dvi.StoreError, match=r"does not exist: what should be a folder in this path is a file"):
        dvi.load(tmp_path / "file" / "race.h5")
    race.save(tmp_path / "race.h5")
    monkeypatch.setattr("builtins.open", refuse(errno.EACCES))
    with pytest.raises(dvi.StoreError, match="is not readable"):
        dvi.load(tmp_path / "race.h5")


# ---- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", UNUSABLE.values(), ids=UNUSABLE)
def test_a_picture_that_cannot_be_written_is_named(make, race, tmp_path):
    path, words = make(tmp_path)
    with pytest.raises(dvi.StoreError, match=words):
        race.plot(path)


def test_pictures_are_written_whole(race, tmp_path, monkeypatch):
    race.plot(tmp_path / "race")
    race.plot(tmp_path / "race.pdf")
    assert sorted(os.listdir(tmp_path)) == ["race.pdf", "race.png"]
    before = (tmp_path / "race.pdf").read_bytes()
    with pytest.raises(ValueError, match=r"cannot write the format \.txt; choose"):
        race.plot(tmp_path / "race.txt")
    monkeypatch.setattr(os, "replace", refuse(errno.ENOSPC))
    with pytest.raises(dvi.StoreError, match="Free some space"):
        race.plot(tmp_path / "race.pdf")
    assert (tmp_path / "race.pdf").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["race.pdf", "race.png"]


# ---- from the shell ------------------------------------------------------------------------------------------------


def test_the_shell_tries_its_paths_before_the_run(race, tmp_path, capsys, monkeypatch):
    begun = functools.wraps(dvi.compare)(lambda *args, **options: pytest.fail("the run has begun"))
    monkeypatch.setattr(dvi, "compare", begun)  # with the signature, which the flags are read off
    flags = ["compare", "--n", "20", "--width", "4", "--method", "gd", "--steps", "3", "--quiet", "--out"]
    (tmp_path / "taken").write_text("a file")
    assert cli.main([*flags, str(tmp_path / "taken")]) == 2
    assert "taken is a file" in capsys.readouterr().err
    (tmp_path / "runs" / "race.png").mkdir(parents=True)
    assert cli.main([*flags, str(tmp_path / "runs")]) == 2
    assert "race.png is a folder" in capsys.readouterr().err
    race.save(tmp_path / "race.h5")
    assert cli.main(["plot", str(tmp_path / "race.h5"), "--out", str(tmp_path / "taken" / "x.png")]) == 2
    assert "taken is a file" in capsys.readouterr().err
