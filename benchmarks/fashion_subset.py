"""Make the subset of Fashion-MNIST that ships with the library from the original files.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion_subset.py /usr/share/datasets/fashion-mnist problems/catalogue/fashion-mnist

The subset has the first 100 training pictures and the first 20 test pictures of each class, in their order.  The files
are the same on every machine, up to the version of zlib.
"""

import argparse
import gzip
import struct
from pathlib import Path

import torch

from dvi.problems.catalogue.fashion import NAMES, SUMS, read_idx

PER_CLASS = {"train": 100, "t10k": 20}


def first_of_each_class(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the first ``count`` examples of each class, in ascending order."""
    chosen = [torch.nonzero(labels == label).flatten()[:count] for label in labels.unique()]
    return torch.cat(chosen).sort().values


def write_idx(path: Path, array: torch.Tensor) -> None:
    """Write bytes as a packed IDX file without a time stamp."""
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.contiguous().numpy().tobytes(), compresslevel=9, mtime=0))


def make_subset(source: Path, target: Path, sums: dict[str, str]) -> None:
    """Read the four files of ``source``, compare their checksums, and write the subset to ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    arrays = {name: read_idx(source / f"{name}.gz", sums.get(name)) for name in NAMES}
    for part, count in PER_CLASS.items():
        chosen = first_of_each_class(arrays[f"{part}-labels-idx1-ubyte"], count)
        for name in NAMES:
            if name.startswith(part):
                write_idx(target / f"{name}.gz", arrays[name][chosen])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of the original files")
    parser.add_argument("target", type=Path, help="the folder to write to")
    arguments = parser.parse_args()
    make_subset(arguments.source, arguments.target, SUMS)
