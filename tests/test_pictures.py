"""The readers of CIFAR-10 and Fashion-MNIST, on files that are made here, and the subset that ships."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import struct
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import dvi
from dvi.problems import ProblemError, cifar10, fashion
from dvi.problems.catalogue import cifar
from dvi.problems.catalogue.cifar import load_cifar10
from dvi.problems.catalogue.fashion import NAMES, SHIPPED, SUMS, load_fashion, read_idx
from dvi.problems.catalogue.pictures import choose

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = Path("/usr/share/datasets/fashion-mnist")  # where Debian puts it
F64 = torch.float64


# ---- which pictures, and how they are scaled ---------------------------------------------------------------


def made(counts, side=4, channels=2, seed=0):
    """Pictures of random bytes with labels in turn, ``counts`` of each class as long as there are some left."""
    rng = np.random.default_rng(seed)
    labels = torch.tensor(rng.permutation(np.repeat(np.arange(len(counts)), counts)), dtype=torch.uint8)
    images = torch.tensor(rng.integers(0, 256, (len(labels), channels, side, side), dtype=np.uint8))
    return images, labels


def test_the_first_of_each_class_in_an_order_from_the_seed():
    train, test = made([5, 7, 6], seed=1), made([2, 3, 1], seed=2)
    found = choose(train, test, 5, 2, None, 0, F64, "cpu")
    first = [torch.nonzero(train[1] == label).flatten()[:count] for label, count in ((0, 3), (1, 2))]
    wanted = train[0][torch.cat(first)].double()
    mean, deviation = wanted.mean((0, 2, 3), keepdim=True), wanted.std((0, 2, 3), keepdim=True)
    ours = found.inputs * deviation + mean
    order = [[int((picture - other).abs().max() < 1e-9) for other in wanted].index(1) for picture in ours]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert found.labels.tolist() == [int(position >= 3) for position in order]
    assert found.labels.dtype == torch.int64
    assert torch.equal(choose(train, test, 5, 2, None, 0, F64, "cpu").inputs, found.inputs)
    others = [choose(train, test, 5, 2, None, seed, F64, "cpu").inputs for seed in range(1, 6)]
    assert any(not torch.equal(other, found.inputs) for other in others)
    # tests are all of the two classes, in their order, and scaled like the others
    tested = test[0][test[1] < 2].double()
    assert torch.allclose(found.test_inputs * deviation + mean, tested, atol=1e-9)
    assert torch.equal(found.test_labels, test[1][test[1] < 2].long())


def test_each_channel_is_scaled_by_itself():
    images, labels = made([10, 10])
    images[:, 1] //= 7
    found = choose((images, labels), (images, labels), 20, 2, None, 0, F64, "cpu")
    assert torch.allclose(found.inputs.mean((0, 2, 3)), torch.zeros(2, dtype=F64), atol=1e-12)
    assert torch.allclose(found.inputs.std((0, 2, 3)), torch.ones(2, dtype=F64), rtol=1e-12)


def test_sides_are_averaged():
    train = made([3, 3])
    coarse = choose(train, train, 6, 2, 2, 0, F64, "cpu").test_inputs
    blocks = train[0].double().view(6, 2, 2, 2, 2, 2).mean((3, 5))
    blocks = (blocks - blocks.mean((0, 2, 3), keepdim=True)) / blocks.std((0, 2, 3), keepdim=True)
    assert torch.allclose(coarse, blocks, rtol=1e-9, atol=1e-12)
    with pytest.raises(ProblemError, match="averaged to 1, 2, 4; got pixels=3"):
        choose(train, train, 6, 2, 3, 0, F64, "cpu")


@pytest.mark.parametrize(
    ("n", "classes", "message"),
    [
        (4, 1, "2 to 3 classes"),
        (4, 4, "2 to 3 classes"),
        (1, 2, "at least one picture of each"),
        (12, 3, "needs 4 pictures of class 1, and there are 3"),
    ],
)
def test_too_few_pictures(n, classes, message):
    with pytest.raises(ProblemError, match=message):
        choose(made([4, 3, 5]), made([1, 1, 1]), n, classes, None, 0, F64, "cpu")


def test_an_empty_channel_and_a_device_that_is_not_there():
    images, labels = made([2, 2])
    with pytest.raises(ProblemError, match="no device 'cuda:77'"):
        choose((images, labels), (images, labels), 4, 2, None, 0, F64, "cuda:77")
    images[:, 0] = 3
    with pytest.raises(ProblemError, match="one value in all chosen pictures"):
        choose((images, labels), (images, labels), 4, 2, None, 0, F64, "cpu")


# ---- CIFAR-10 ----------------------------------------------------------------------------------------------


RECORDS = 20  # in a file that is made here, of the 10,000 in an original


@pytest.fixture
def batches(monkeypatch):
    """Six short files of the right form: labels in turn, planes that say their class, channel and row."""
    monkeypatch.setattr(cifar, "RECORDS", RECORDS)
    files = {}
    for i, name in enumerate(cifar.SUMS):
        records = np.zeros((RECORDS, 3073), dtype=np.uint8)
        records[:, 0] = (np.arange(RECORDS) + i) % 10
        planes = records[:, 1:].reshape(RECORDS, 3, 32, 32)
        planes += (20 * records[:, 0])[:, None, None, None]
        planes += np.array([1, 2, 3], dtype=np.uint8)[:, None, None] * np.arange(8, dtype=np.uint8).repeat(4)[:, None]
        planes[:, :, 0, 0] += np.uint8(i)
        files[name] = records.tobytes()
    return files


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def known(batches, monkeypatch):
    """The files that were made are taken for the originals."""
    sums = {name: hashlib.md5(content).hexdigest() for name, content in batches.items()}
    monkeypatch.setattr(cifar, "SUMS", sums)
    return batches


def packed(path, files):
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{cifar.UNPACKED}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_cifar_is_read_plane_by_plane_and_row_by_row(known, tmp_path):
    found = load_cifar10(write(tmp_path, known), n=8, classes=4)
    assert (found.inputs.shape, found.test_inputs.shape) == ((8, 3, 32, 32), (8, 3, 32, 32))
    assert sorted(found.labels.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    # Undone by hand: class·20 + (channel + 1)·(row // 4), but for the first pixel, which counts the file.
    raw = torch.empty(8, 3, 32, 32, dtype=F64)
    for picture, label in zip(raw, found.labels.tolist(), strict=True):
        for channel in range(3):
            picture[channel] = 20 * label + (channel + 1) * (torch.arange(32) // 4)[:, None]
    assert torch.allclose(
        found.inputs,
        (raw - raw.mean((0, 2, 3), keepdim=True)) / raw.std((0, 2, 3), keepdim=True),
        rtol=1e-9,
        atol=1e-12,
    )
    # The tests are of the sixth file, whose first pixel is 5 higher.
    deviation = raw.std((0, 2, 3))
    test = found.test_inputs[found.test_labels == 0][0]
    assert torch.allclose((test[:, 0, 0] - test[:, 0, 1]) * deviation, torch.full((3,), 5.0, dtype=F64))


def test_the_archive_and_its_folder_are_read_alike(known, tmp_path):
    expected = load_cifar10(write(tmp_path / "a", known), n=4, classes=2)
    write(tmp_path / "b" / cifar.UNPACKED, known)
    (tmp_path / "c").mkdir()
    packed(tmp_path / "c" / cifar.ARCHIVE, known)
    for folder in ("b", "c"):
        found = load_cifar10(tmp_path / folder, n=4, classes=2)
        assert torch.equal(found.inputs, expected.inputs)
        assert torch.equal(found.test_inputs, expected.test_inputs)


def test_altered_and_truncated_files_are_refused(known, tmp_path):
    folder = write(tmp_path, known)
    content = bytearray(known["data_batch_3.bin"])
    content[12_345] ^= 1
    (folder / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(ProblemError, match=r"data_batch_3.bin is not the original: its MD5 is .*fetch it again"):
        load_cifar10(folder)
    (folder / "data_batch_3.bin").write_bytes(content[:-1])
    with pytest.raises(ProblemError, match=r"data_batch_3.bin has 61,459 bytes instead of 61,460 .*cs.toronto"):
        load_cifar10(folder)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(ProblemError, match=r"there is no data_batch_3.bin in .*cs.toronto"):
        load_cifar10(folder)


def test_made_files_are_not_taken_for_the_originals(batches, tmp_path):
    with pytest.raises(ProblemError, match=r"data_batch_1.bin is not the original.*5dd7e06a14cb22eb9f671a540d1b7c25"):
        load_cifar10(write(tmp_path, batches))


def test_an_archive_that_was_cut_short(known, tmp_path):
    archive = tmp_path / cifar.ARCHIVE
    packed(archive, known)
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(ProblemError, match=r"cifar-10-binary.tar.gz cannot be read .*cut short or altered"):
        load_cifar10(tmp_path)
    packed(archive, {"data_batch_1.bin": known["data_batch_1.bin"]})
    with pytest.raises(ProblemError, match=r"cannot be read .*data_batch_2.bin"):
        load_cifar10(tmp_path)


def test_a_label_beyond_nine():
    content = bytes([10]) + bytes(3072)
    with pytest.raises(ProblemError, match="a label 10"):
        cifar.read_batch(content + bytes(3073 * 9_999), "data_batch_1.bin")
    with pytest.raises(ProblemError, match=r"has 3,073 bytes instead of 30,730,000 \(10,000 pictures of 3,073\)"):
        cifar.read_batch(content, "data_batch_1.bin")


def test_missing_cifar_says_where_it_comes_from(tmp_path):
    with pytest.raises(ProblemError, match=r"neither cifar-10-binary.tar.gz nor .* in .*www.cs.toronto.edu.*binary"):
        cifar10(tmp_path)
    # Python's version is made of pickles, which are not opened.
    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(ProblemError, match="take the binary version"):
        cifar10(tmp_path)


def test_the_problem_of_cifar(known, tmp_path):
    problem = cifar10(write(tmp_path, known), "cnn-pool", n=4, classes=2, pixels=8)
    assert problem.name == "cifar10-cnn-pool-mse"
    problem.check()


# ---- Fashion-MNIST -----------------------------------------------------------------------------------------


def idx(array):
    array = np.asarray(array, dtype=np.uint8)
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_idx_files(tmp_path):
    array = np.arange(24).reshape(2, 3, 4)
    plain, small = tmp_path / "plain", tmp_path / "packed.gz"
    plain.write_bytes(idx(array))
    small.write_bytes(gzip.compress(idx(array)))
    for path in (plain, small):
        assert np.array_equal(read_idx(path).numpy(), array)
        read_idx(path, hashlib.sha256(idx(array)).hexdigest())
        with pytest.raises(ProblemError, match="not the original: its SHA256"):
            read_idx(path, "0" * 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((2, 3)))[:-1], "announces 2 × 3 bytes and has 5: it was cut short"),
        (idx(np.zeros((2, 3))) + b"\0", "announces 2 × 3 bytes and has 7"),
        (b"\0\0\x08\x03\0\0", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\0", "not an IDX file of bytes: it begins with 00 00 0d 01"),
        (b"", "begins with nothing"),
    ],
)
def test_idx_files_of_another_form(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ProblemError, match=message):
        read_idx(path)


def test_a_packed_file_that_was_cut_short(tmp_path):
    path = tmp_path / "file.gz"
    whole = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (20, 20))))
    altered = bytearray(whole)
    altered[100] ^= 255
    for content in (whole[:-20], bytes(altered), b"no gzip"):
        path.write_bytes(content)
        with pytest.raises(ProblemError, match=r"cannot be unpacked .*cut short or altered"):
            read_idx(path)


def test_missing_fashion_says_where_it_comes_from(tmp_path):
    with pytest.raises(
        ProblemError, match=r"no train-images-idx3-ubyte.gz nor .*dataset-fashion-mnist.*zalandoresearch"
    ):
        fashion(folder=tmp_path)
    with pytest.raises(ProblemError, match=r"1000 pictures ship .*n=1001 name a folder"):
        fashion(n=1001)


def test_the_shipped_subset():
    shapes = [tuple(read_idx(SHIPPED / f"{name}.gz").shape) for name in NAMES]
    assert shapes == [(1000, 28, 28), (1000,), (200, 28, 28), (200,)]
    found = load_fashion()
    assert found.labels.bincount().tolist() == [100] * 10
    assert found.test_labels.bincount().tolist() == [20] * 10
    assert "Zalando" in (SHIPPED / "LICENSE").read_text()
    assert "MIT License" in (SHIPPED / "LICENSE").read_text()
    four = load_fashion(n=40, classes=4, pixels=14, dtype=torch.float32)
    assert (four.inputs.shape, four.inputs.dtype) == ((40, 1, 14, 14), torch.float32)
    assert four.test_inputs.shape == (80, 1, 14, 14)
    # Pictures and labels belong together: the nearest mean of its class tells more than half of the tests right.
    means = torch.stack([found.inputs[found.labels == label].mean(0) for label in range(10)])
    nearest = (found.test_inputs[:, None] - means).square().sum((2, 3, 4)).argmin(1)
    assert (nearest == found.test_labels).double().mean() > 0.5


def test_the_package_has_the_pictures():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    catalogue = ROOT / setuptools["package-dir"]["dvi.problems.catalogue"]
    listed = {
        path for pattern in setuptools["package-data"]["dvi.problems.catalogue"] for path in catalogue.glob(pattern)
    }
    assert {path.name for path in listed} == {*(f"{name}.gz" for name in NAMES), "LICENSE"}


def test_pictures_from_the_shell(tmp_path, capsys):
    pytest.importorskip("tyro")
    from dvi import cli

    flags = ["--problem.network", "cnn-pool", "--problem.size", "small", "--problem.loss", "ce", "--n", "4"]
    flags += ["--classes", "2", "--pixels", "14", "--method", "gd", "--lr", "0.1", "--steps", "1", "--warm-start", "0"]
    flags += ["--runs", "discrete", "--eigen-every", "0", "--no-plot", "--quiet"]
    assert cli.main(["compare", "--problem", "fashion", *flags, "--out", str(tmp_path)]) == 0
    assert dvi.load(tmp_path / "race.h5").about["problem"].startswith("ModuleProblem('fashion-cnn-pool-ce'")
    assert cli.main(["compare", "--problem", "cifar10", "--folder", str(tmp_path), "--steps", "1"]) != 0
    assert "www.cs.toronto.edu" in capsys.readouterr().err


def tool():
    spec = importlib.util.spec_from_file_location("fashion_subset", ROOT / "benchmarks" / "fashion_subset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_takes_the_first_of_each_class(tmp_path):
    """With labels in turn 0 … 9, the first 100 of each are the first 1,000; and the rows stay with their labels."""
    source = tmp_path / "source"
    source.mkdir()
    for part, count in (("train", 1500), ("t10k", 300)):
        labels = np.arange(count) % 10
        images = np.arange(count)[:, None, None] % 251 * np.ones((1, 2, 2))
        (source / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (source / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    tool().make_subset(source, tmp_path / "target", {})
    train, labels, test, test_labels = (read_idx(tmp_path / "target" / f"{name}.gz") for name in NAMES)
    assert labels.tolist() == [i % 10 for i in range(1000)]
    assert train[:, 0, 0].tolist() == [i % 251 for i in range(1000)]
    assert test_labels.tolist() == [i % 10 for i in range(200)]
    assert test[:, 1, 1].tolist() == [i % 251 for i in range(200)]


@pytest.mark.skipif(not ORIGINAL.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_shipped_subset_is_that_of_the_originals(tmp_path):
    tool().make_subset(ORIGINAL, tmp_path, SUMS)
    for name in NAMES:
        assert torch.equal(read_idx(tmp_path / f"{name}.gz"), read_idx(SHIPPED / f"{name}.gz"))
    whole, subset = load_fashion(n=30, classes=3, folder=ORIGINAL), load_fashion(n=30, classes=3)
    assert torch.equal(whole.inputs, subset.inputs)
    assert len(whole.test_inputs) == 3000
