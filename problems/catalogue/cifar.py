"""CIFAR-10: 32×32 colour pictures of animals and vehicles, from the official binary files."""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch
from torch import Tensor

from dvi.problems.catalogue.pictures import Pictures, check_sum, choose
from dvi.problems.errors import ProblemError

ARCHIVE = "cifar-10-binary.tar.gz"
UNPACKED = "cifar-10-batches-bin"

#: MD5 of each file of the official archive; that of the archive is c32a1d4ab5d03f1284b67883e8d87530.
SUMS = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}

#: A picture: one byte for the label, then the red, the green and the blue plane, row by row.
RECORD = 1 + 3 * 32 * 32
RECORDS = 10_000

SOURCE = (
    f"CIFAR-10 comes from https://www.cs.toronto.edu/~kriz/cifar.html: take the binary version, {ARCHIVE}, "
    "and name the folder in which it lies, or that of the .bin files once unpacked"
)


def load_cifar10(
    folder: str | Path,
    n: int = 1000,
    classes: int = 10,
    pixels: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Pictures:
    """Pictures [n, 3, 32, 32] with labels, chosen and scaled as in the paper.

    Args:
        folder: the folder with the official ``cifar-10-binary.tar.gz``, or with its six .bin files.
        n: number of training pictures: the first n/classes of each class.
        classes: the classes below this, 2 to 10: airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck.
        pixels: a side is averaged down to this many: 16, 8, 4, 2 or 1; None leaves 32.
        seed: of the order of the pictures.
        dtype: of the pictures.
        device: of the pictures and labels.

    Raises:
        ProblemError: if files are missing, truncated or altered, or if there are fewer pictures than asked for.

    """
    contents = _contents(Path(folder).expanduser())
    batches = [read_batch(contents[name], name, md5) for name, md5 in SUMS.items()]
    train = (torch.cat([x for x, _ in batches[:-1]]), torch.cat([y for _, y in batches[:-1]]))
    return choose(train, batches[-1], n, classes, pixels, seed, dtype, device)


def _contents(folder: Path) -> dict[str, bytes]:
    """The contents of the six files, from the folder itself, the unpacked archive's folder in it, or the archive."""
    for place in (folder, folder / UNPACKED):
        present = [name for name in SUMS if (place / name).is_file()]
        if present:
            missing = [name for name in SUMS if name not in present]
            if missing:
                raise ProblemError(f"there is no {', '.join(missing)} in {place}. {SOURCE}")
            return {name: (place / name).read_bytes() for name in SUMS}
    archive = folder / ARCHIVE
    if not archive.is_file():
        raise ProblemError(f"there is neither {ARCHIVE} nor {next(iter(SUMS))} in {folder}. {SOURCE}")
    contents = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in SUMS:
                member = tar.extractfile(f"{UNPACKED}/{name}")
                assert member is not None  # a file has contents
                contents[name] = member.read(RECORD * RECORDS + 1)
    except (tarfile.TarError, EOFError, OSError, KeyError, AssertionError) as error:
        raise ProblemError(f"{archive} cannot be read ({error}): it was cut short or altered. {SOURCE}") from error
    return contents


def read_batch(content: bytes, name: str, md5: str | None = None) -> tuple[Tensor, Tensor]:
    """Pictures [10000, 3, 32, 32] and labels [10000], both uint8, of one binary file of CIFAR-10.

    Args:
        content: the bytes of the file.
        name: its name, for messages.
        md5: its checksum, if known.

    Raises:
        ProblemError: if the contents are truncated, altered or of another form.

    """
    if len(content) != RECORD * RECORDS:
        raise ProblemError(
            f"{name} has {len(content):,} bytes instead of {RECORD * RECORDS:,} "
            f"({RECORDS:,} pictures of {RECORD:,}): it was cut short or is another file. {SOURCE}"
        )
    if md5 is not None:
        check_sum(content, "md5", md5, name)
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(RECORDS, RECORD)
    labels = records[:, 0]
    if int(labels.max()) > 9:
        raise ProblemError(f"{name} has a label {int(labels.max())}; those of CIFAR-10 are 0 to 9")
    return records[:, 1:].view(RECORDS, 3, 32, 32), labels
