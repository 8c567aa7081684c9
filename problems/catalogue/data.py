"""Data of the examples: handwritten digits and the paper's sorting task."""

from __future__ import annotations

import torch
from torch import Tensor

from dvi.problems.errors import ProblemError


def usable(device: torch.device | str) -> torch.device:
    """Return the device of that name after a test that it works.

    Raises:
        ProblemError: if this machine has no such device.

    """
    try:
        found = torch.device(device)
        torch.zeros((), device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's own kinds, by backend
        cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here = ", ".join(["cpu", *cards])
        raise ProblemError(f"there is no device {device!r} to use; on this machine: {here}") from error
    return found


def load_digits(
    n: int = 1000,
    classes: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] and labels [n] (int64) of ``n`` handwritten digits below ``classes``.

    Pixels are shifted and scaled to mean 0 and variance 1 over all pixels of the subset together.  Scaling each pixel
    by itself would divide by zero, since some never change.  The subset depends only on the seed.

    Raises:
        ImportError: if scikit-learn, which ships the images, is missing.
        ProblemError: if there are fewer digits than asked for, or no such device.

    """
    device = usable(device)
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install dvi-flows[data]") from error
    images, labels = load(return_X_y=True)
    x, y = torch.from_numpy(images), torch.from_numpy(labels).long()
    x, y = x[y < classes], y[y < classes]
    if not 2 <= classes <= 10 or not 1 <= n <= len(x):
        raise ProblemError(f"there are {len(x)} digits of 2 to 10 classes below {classes}; got n={n}")
    chosen = torch.randperm(len(x), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:n]
    x, y = x[chosen], y[chosen]
    x = (x - x.mean()) / x.std()
    return x.view(n, 1, 8, 8).to(device, dtype), y.to(device)


def make_sorting(
    n: int = 1000,
    length: int = 8,
    alphabet: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Tokens [n, 2·length − 1] and targets [n, length], both int64.

    As in minGPT's demonstration, the tokens are a random sequence followed by the sorted sequence, without the last
    token.  The targets are the sorted sequence: the next tokens from the last position of the random sequence on.

    Raises:
        ProblemError: if a size is not positive, or there is no such device.

    """
    if min(n, length, alphabet) < 1:
        raise ProblemError(f"n, length and alphabet are positive; got {n}, {length}, {alphabet}")
    generator = torch.Generator("cpu").manual_seed(seed)
    device = usable(device)
    sequences = torch.randint(alphabet, (n, length), generator=generator, device="cpu", dtype=torch.int64)
    solved = sequences.sort(dim=1).values
    return torch.cat([sequences, solved[:, :-1]], dim=1).to(device), solved.to(device)
