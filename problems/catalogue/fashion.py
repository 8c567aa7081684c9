"""Fashion-MNIST: 28×28 grey pictures of clothes, from IDX files; a subset is shipped next to this file."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from dvi.problems.catalogue.pictures import Pictures, check_sum, choose
from dvi.problems.errors import ProblemError

#: The shipped subset: the first 100 training pictures and the first 20 test pictures of each class.
SHIPPED = Path(__file__).with_name("fashion-mnist")

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

#: SHA-256 of the original files once unpacked.
SUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

SOURCE = (
    "Fashion-MNIST is in Debian's package dataset-fashion-mnist (folder /usr/share/datasets/fashion-mnist) and at "
    "https://github.com/zalandoresearch/fashion-mnist"
)


def load_fashion(
    n: int = 1000,
    classes: int = 10,
    pixels: int | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Pictures:
    """Pictures of clothes [n, 1, 28, 28] with labels, chosen and scaled as in the paper's experiments on CIFAR-10.

    Args:
        n: number of training pictures: the first n/classes of each class.  1,000 (100 of each) ship with the library.
        classes: the classes below this, 2 to 10: T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag,
            boot.
        pixels: a side is averaged down to this many: 14, 7, 4, 2 or 1; None leaves 28.
        folder: the folder with the four original IDX files, packed (.gz) or not; None takes the 1,000 + 200 pictures
            that are shipped.
        seed: of the order of the pictures.
        dtype: of the pictures.
        device: of the pictures and labels.

    Raises:
        ProblemError: if files are missing, truncated or altered, or if there are fewer pictures than asked for.

    """
    where = SHIPPED if folder is None else Path(folder).expanduser()
    sums = {} if folder is None else SUMS
    arrays = [read_idx(_find(where, name), sums.get(name)) for name in NAMES]
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ProblemError(f"{where}: pictures {list(images.shape)} and labels {list(labels.shape)} do not match")
    train, train_labels, test, test_labels = arrays
    if folder is None and n > len(train):
        raise ProblemError(f"{len(train)} pictures ship with the library; for n={n} name a folder with all. {SOURCE}")
    pairs = ((train[:, None], train_labels), (test[:, None], test_labels))
    return choose(*pairs, n, classes, pixels, seed, dtype, device)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise ProblemError(f"there is no {name}.gz nor {name} in {folder}. {SOURCE}")


def read_idx(path: Path, sha256: str | None = None) -> Tensor:
    """Return the bytes of an IDX file, packed (.gz) or not, as an array in the file's shape.

    An IDX file of bytes begins with the bytes 0, 0, 8 and the number of dimensions.  Then come the sizes, each as four
    bytes, the highest first.

    Args:
        path: of the file.
        sha256: the checksum of the unpacked file, if known.

    Raises:
        ProblemError: if the file is truncated, altered or of another form.

    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ProblemError(f"{path} cannot be unpacked ({error}): it was cut short or altered") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ProblemError(f"{path} is not an IDX file of bytes: it begins with {content[:4].hex(' ') or 'nothing'}")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ProblemError(
            f"{path} announces {' × '.join(map(str, shape))} bytes and has {len(content) - start}: "
            "it was cut short or altered"
        )
    if sha256 is not None:
        check_sum(content, "sha256", sha256, str(path))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
