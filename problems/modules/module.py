"""Any ``nn.Module`` as a loss of its flat parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dvi.problems.derivatives.locate import name_culprit
from dvi.problems.derivatives.protocol import Part
from dvi.problems.distributed.ranks import ALONE, Ranks
from dvi.problems.errors import ProblemError
from dvi.problems.examples import (
    CHUNKED,
    SHARED,
    Examples,
    arguments,
    count,
    find_reduction,
    own,
    refuse_different,
    refuse_unusable,
    take,
)
from dvi.problems.fingerprint import fingerprint
from dvi.problems.inspection import Watcher, attentive, past_w
from dvi.problems.minibatch import MiniBatches
from dvi.problems.modules.flat_model import FlatModel, kept_tensors
from dvi.problems.modules.loading import is_source, read
from dvi.problems.modules.originals import Originals
from dvi.problems.modules.outputs import curvature
from dvi.problems.problem import Backend, Problem

Criterion = Callable[..., Tensor]
Output = str | int | Callable[[Any], Any]
Penalty = Callable[[Mapping[str, Tensor]], Tensor]


class ModuleProblem(Problem):
    """The loss ``criterion(model(inputs), targets)`` as a function of the model's trainable parameters, flat.

    The problem works on copies of the model and of the data.  It never writes to yours, and later changes of yours do
    not change the loss.  Parameters with ``requires_grad=False`` keep their value.  A parameter shared by several
    modules counts once.  A complex parameter is stored in w as pairs of real numbers.  The padding row of an embedding
    stays constant.

    Args:
        model: a deterministic module.  Its dtype and device are the problem's.
        criterion: ``(outputs, targets) -> []``, or ``outputs -> []`` without targets.  If the data are taken in chunks,
            it must be a mean or a sum over examples.  None for a model that computes its loss itself: the loss is its
            output, or the output's ``loss``.
        inputs: a tensor [n, ...]; a tuple of them for a model of several arguments; a mapping for arguments by name;
            without chunks, any structure of tensors (a graph).  Or a ``torch.utils.data`` data set or loader of
            (inputs, targets), which is read once, in order.
        targets: passed to the criterion unchanged: a tensor [n, ...], another structure of tensors, or None.
        chunk_size: number of examples to take at a time; None for all at once.  The derivatives are the same up to
            rounding; the memory is that of one chunk.
        output: the part of the model's output that the criterion gets: a name ("logits"), an index, or a function of
            the output.  None: the whole output.
        penalty: a function of the parameters by name that is added to the loss, as in
            ``lambda p: 0.01 * p["0.weight"].abs().sum()``.
        weight_decay: λ ≥ 0: ½λ‖w‖² is added to the loss, which is ``weight_decay`` of ``torch.optim.SGD``.
        derivatives, max_directions, name: as in :class:`Problem`.

    Attributes:
        parameter_slices: the slice of w for each parameter, by name.
        parameter_shapes: its shape, by name.

    Raises:
        ProblemError: if the model has nothing to train, mixes dtypes or devices, is stochastic, or changes its buffers;
            if the loss depends on other trained tensors; if the data do not fit.  With ``chunk_size``, also if the
            model couples examples, or if the criterion is neither a mean nor a sum over examples.

    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None,
        inputs: Examples,
        targets: Examples = None,
        chunk_size: int | None = None,
        *,
        output: Output | None = None,
        penalty: Penalty | None = None,
        weight_decay: float = 0.0,
        derivatives: Backend = "autodiff",
        max_directions: int = 1,
        name: str | None = None,
    ) -> None:
        if is_source(inputs):
            if targets is not None:
                raise ProblemError(f"a {type(inputs).__name__} holds its targets itself: leave targets out")
            inputs, targets = read(inputs)
        if not weight_decay >= 0:
            raise ProblemError(f"weight_decay is zero or positive; got {weight_decay!r}")
        self._model = FlatModel(model)
        self._originals = Originals(model)
        self.weight_decay = float(weight_decay)
        self.parameter_shapes = self._model.shapes
        self.parameter_slices = self._model.slices
        w0 = self._model.w0
        refuse_unusable(inputs, "inputs", w0)
        if targets is not None:
            refuse_unusable(targets, "targets", w0, any_dtype=True)
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ProblemError(f"chunk_size counts examples, at least 1; got {chunk_size!r}")
        self._inputs, self._targets = own(inputs), own(targets)
        self._chunk_size = chunk_size
        self._loss = _Loss(self._model, criterion, output)
        self._added = _Added(self._model, penalty, float(weight_decay))
        # The user's own parameters: a loss that reads them bypasses w.
        owners = {"the criterion": criterion, "the model": model}
        self._foreign = {
            id(p): f"{owner}'s parameter {path}"
            for owner, module in owners.items()
            if isinstance(module, nn.Module)
            for path, p in module.named_parameters()
            if p.requires_grad
        }
        self._foreign |= kept_tensors(model)
        super().__init__(
            self._parts_of(w0),
            w0,
            derivatives=derivatives,
            max_directions=max_directions,
            name=name or type(model).__name__,
        )
        for path in self._model.changed_buffers():
            raise ProblemError(
                f"a forward pass changes the buffer {path}: the loss is not a function of w alone. "
                "Call model.eval() first (or, of batch norm: track_running_stats=False)"
            )
        self._foreign, self._model.stale = {}, {}  # not needed any more, and the user's model may be freed

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the model's trainable parameters, in their order in w."""
        return tuple(tuple(shape) for shape in self.parameter_shapes.values())

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of a parameter of the model that this problem was made from; None for any other tensor."""
        return self._originals.name_of(parameter)

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the parameters with constant rows (the padding row of an embedding)."""
        return tuple(self._model._held)

    def _by_name(self, values: Mapping[str, float]) -> Tensor:
        unknown = sorted(set(values) - set(self.parameter_slices))
        if unknown:
            raise ProblemError(
                f"no trainable parameter is called {', '.join(unknown)}; there are {', '.join(self.parameter_slices)}"
            )
        vector = torch.zeros_like(self.w0)
        for name, value in values.items():
            vector[self.parameter_slices[name]] = value
        return vector

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the inputs, of the targets, and of all tensors that are not trained (buffers, frozen weights)."""
        contents = {"inputs": self._inputs, "targets": self._targets, "fixed tensors": self._model.fixed()}
        return {
            name: fingerprint(tensors, self._ranks if name != "fixed tensors" else ALONE)
            for name, tensors in contents.items()
        }

    def outputs(self, w: Tensor, inputs: Examples) -> Any:
        """Return the outputs of the model with weights ``w`` [d] for ``inputs``, which have the form of the problem's.

        Raises:
            ProblemError: if an argument is not of the right shape, dtype and device.

        """
        self._check_weights(w)
        refuse_unusable(inputs, "inputs", self.w0)
        with torch.enable_grad():  # w asks for none, but a model may differentiate by its inputs
            return pytree.tree_map(
                lambda x: x.detach() if isinstance(x, Tensor) else x, self._loss.outputs(w.detach(), inputs)
            )

    def output_curvature(self, w: Tensor, inputs: Examples, U: Tensor, X: Tensor) -> Tensor:
        """Half the second directional derivatives ½⟨∇²h, U X Uᵀ⟩ of every output h, in the outputs' shape.

        If the weights oscillate about w with covariance Σ = U X Uᵀ, the average of the outputs is h(w) plus this.  The
        model's output (or the part that ``output`` selects) must be one tensor.

        Args:
            w: weights [d].
            inputs: in the form of the problem's; taken ``chunk_size`` at a time.
            U: directions [d, k].
            X: a symmetric matrix [k, k] of any signature.

        Raises:
            ProblemError: if an argument is not of the right shape, dtype and device.
            DerivativeError: if the model has no second derivative.

        """
        self._check_weights(w)
        self._check_block(U, "U")
        refuse_unusable(inputs, "inputs", self.w0)
        weights, directions = self._principal_directions(U, X)
        n = count(inputs)
        chunks = [inputs]
        if self._chunk_size is not None and n is not None:
            chunks = [take(inputs, slice(a, a + self._chunk_size)) for a in range(0, n, self._chunk_size)]
        return torch.cat(
            [
                curvature(partial(self._loss.outputs, inputs=chunk), w, directions, weights, self.derivatives)
                for chunk in chunks
            ]
        )

    def load_into(self, model: nn.Module, w: Tensor) -> None:
        """Write flat weights ``w`` [d] into the parameters of ``model``: the problem's model, or one of the same
        structure.

        Raises:
            ProblemError: if ``w`` or the model's parameters do not fit.

        """
        self._check_weights(w)
        self._model.load_into(model, w)

    def mini_batches(self, max_gib: float = 0.5) -> MiniBatches:
        """The examples, one by one and in batches.  The loss of every batch includes the penalty and weight decay.

        Args:
            max_gib: memory for the gradients of a chunk of examples, in GiB.

        Raises:
            ProblemError: if the loss is not a mean over independent examples of equal weight.

        """
        if self._ranks is not ALONE:
            raise ProblemError("a distributed problem has no mini-batches: make them in one process")
        for path, module in self._model.module.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
                raise ProblemError(
                    f"module {path or '(the model itself)'} ({type(module).__name__}) normalises by the statistics of "
                    "its batch, so that the gradient of an example depends on the others in it: call model.eval() "
                    "first, or take GroupNorm or LayerNorm; or leave batch_size out for the full-batch flow"
                )
        if count(self._inputs) is None or (self._targets is not None and count(self._targets) != count(self._inputs)):
            raise ProblemError(
                "mini-batches need inputs and targets that are tensors with one first dimension, the examples"
            )
        return MiniBatches(
            self, _BatchLoss(self._loss, self._added), (self._inputs, self._targets), self._model.install, max_gib
        )

    def _parts_of(self, w0: Tensor) -> list[Part]:
        """Return the loss as a sum over chunks of examples, and the terms that are added to it."""
        if self._chunk_size is None:
            return [_Chunk(self._loss, self._inputs, self._targets, 1.0, self._added)]
        n = self.examples
        if n is None:
            given = [count(self._inputs), None if self._targets is None else count(self._targets)]
            raise ProblemError(
                "to be taken in chunks, inputs and targets must be tensors that share a first dimension, the examples; "
                f"here {given[0] or 'no number of'} inputs and {given[1] or 'no number of'} targets. "
                "Without chunk_size any structure will do"
            )
        reduction = self._reduction(w0)
        chunks = self._chunks(n, reduction, n)
        self._refuse_unequal_examples(w0, chunks)
        return [*chunks, self._added] if self._added else [*chunks]

    @property
    def examples(self) -> int | None:
        """The number of examples; None if the data are not a list of examples."""
        n = count(self._inputs)
        return n if self._targets is None or count(self._targets) == n else None

    def _part(self, examples: slice, weight: float) -> _Chunk:
        targets = None if self._targets is None else take(self._targets, examples)
        return _Chunk(self._loss, take(self._inputs, examples), targets, weight)

    def _reduction(self, w0: Tensor, words: tuple[str, str] = CHUNKED) -> int:
        """Return 1 if the loss of the data is a mean over examples, 0 if a sum."""

        def loss_of(examples: slice) -> float:
            with torch.enable_grad():
                return float(self._part(examples, 1.0)(w0).detach())

        return find_reduction(loss_of, self.examples or 0, words)

    def _chunks(self, of: int, reduction: int, size: int | None = None) -> list[_Chunk]:
        """The loss of the examples, in chunks of a given size, as a part of the loss of all examples."""
        n = self.examples or 0
        size = min(n, size or n, self._chunk_size or n)
        slices = [slice(a, min(a + size, n)) for a in range(0, n, size)]
        return [self._part(chunk, ((chunk.stop - chunk.start) / of) ** reduction) for chunk in slices]

    def _refuse_unequal_examples(self, w0: Tensor, chunks: list[_Chunk], words: tuple[str, str] = CHUNKED) -> None:
        """Check the reduction on all examples: it was found on a few, and padding or class weights may occur only in
        others.
        """
        with torch.enable_grad():
            outputs = [self._loss.outputs(w0, chunk.inputs) for chunk in chunks]
            if all(isinstance(out, Tensor) and out.ndim for out in outputs):
                whole = self._loss.of(torch.cat(outputs), self._targets)
            else:  # outputs of another form cannot be joined: a forward pass over all examples
                whole = _Chunk(self._loss, self._inputs, self._targets, 1.0)(w0)
            refuse_different(sum(float(chunk(w0).detach()) for chunk in chunks), float(whole.detach()), words)

    def _shard(self, ranks: Ranks, whole: bool) -> list[Part]:
        """Keep only the examples of this rank, and return its part of the loss.

        Args:
            ranks: the processes that share the examples.
            whole: True if the examples are those of all ranks, from which this one takes its own.

        """
        n, reduction = self.examples, None
        with ranks.together():
            if n is None:
                raise ProblemError(
                    "inputs and targets are not tensors that share a first dimension, so their examples cannot be "
                    "shared among ranks. Let each rank make dvi.Problem(loss, w0) of its own term of the loss, and "
                    "call dvi.distribute(problem, shards=True)"
                )
            if whole and n < ranks.size:
                raise ProblemError(f"{n} examples cannot be shared among {ranks.size} ranks: start fewer of them")
            if n > 1:  # a single example does not distinguish mean from sum
                at = self._near()
                reduction = self._reduction(at, SHARED)
                if not whole:  # otherwise the loss of all examples is known, and compared later
                    self._refuse_unequal_examples(at, self._chunks(n, reduction, (n + 1) // 2), SHARED)
        kinds = {kind for kind in ranks.gather(reduction) if kind is not None}
        of = sum(ranks.gather(n or 0))
        with ranks.together():
            if whole:
                of = n or 0
                start, stop = (of * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
                self._inputs = own(take(self._inputs, slice(start, stop)))
                self._targets = None if self._targets is None else own(take(self._targets, slice(start, stop)))
            if len(kinds) > 1:
                raise ProblemError("on some ranks the loss is a mean over examples, on others a sum: use one criterion")
            if not kinds and ranks.size > 1:
                raise ProblemError(
                    "each rank has a single example, which does not distinguish a mean over examples from a sum: pass "
                    "all examples on every rank (shards=False), or use fewer ranks"
                )
        chunks = self._chunks(of, min(kinds, default=1))
        # What is added to the loss of the data counts once.
        return [*chunks, self._added] if self._added and ranks.first else [*chunks]

    def _blame(self, w: Tensor) -> str:
        whole = (self._inputs, self._targets)
        # A few examples are faster; if the data are not a list of examples, all are needed.
        chunked = count(self._inputs) is not None and count(self._targets) == count(self._inputs)
        self._model.install(w)
        module = copy.deepcopy(self._model.module)  # modules that are tried alone may end in an invalid state
        return name_culprit(
            module,
            {**dict(module.named_buffers()), **self._model.parameters(w)},
            lambda output, targets: self._loss.of(self._loss.pick(output), targets),
            [take(whole, slice(0, 8)), whole] if chunked else [whole],
        )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        stack: list[str] = []
        watcher = Watcher(self.w0, self._foreign, self._model.stale, stack)
        with attentive(), self._model.traced(stack), self._model.padding_looked_at(), watcher:
            try:
                yield
            except (RuntimeError, TypeError, ValueError) as error:
                n, m = count(self._inputs), None if self._targets is None else count(self._targets)
                if isinstance(error, ProblemError) or n is None or m is None or n == m:
                    raise
                raise ProblemError(f"{n} inputs but {m} targets: {error}") from error

    def _refuse_leaf(self, leaf: Tensor) -> None:
        if any(leaf is x for x in pytree.tree_leaves((self._inputs, self._targets))):
            return  # data that the model differentiates by
        what = self._foreign.get(id(leaf)) or self._model.attribute_of(leaf)
        raise ProblemError(past_w(what or f"a tensor of shape {list(leaf.shape)} that requires a gradient"))

    def _name_random(self) -> str:
        culprit = self._model.find_random_module(lambda: self._loss.outputs(self.w0, self._inputs))
        return f" (it comes from {culprit})" if culprit else ""


Problem.from_module = ModuleProblem


class _Loss:
    """criterion(model(inputs), targets) for weights w.

    Args:
        model: the model.
        criterion, output: as in :class:`ModuleProblem`.

    """

    def __init__(self, model: FlatModel, criterion: Criterion | None, output: Output | None) -> None:
        self.model = model
        self._criterion = criterion
        self._output = output

    def outputs(self, w: Tensor, inputs: Examples) -> Any:
        """The model's output for the inputs, or the selected part of it."""
        self.model.install(w)
        args, kwargs = arguments(inputs)
        return self.pick(self.model.module(*args, **kwargs))

    def of(self, outputs: Any, targets: Examples) -> Tensor:
        """The loss of some outputs."""
        if self._criterion is not None:
            return self._criterion(outputs) if targets is None else self._criterion(outputs, targets)
        loss = outputs if isinstance(outputs, Tensor) else getattr(outputs, "loss", None)
        if loss is None and isinstance(outputs, Mapping):
            loss = outputs.get("loss")
        if not isinstance(loss, Tensor):
            raise ProblemError(
                f"without a criterion the model must return its loss, or an output with a .loss; this one returns a "
                f"{type(outputs).__name__} without it: pass a criterion, or the labels that the model needs"
            )
        return loss

    def pick(self, output: Any) -> Any:
        """The selected part of the model's output."""
        if self._output is None:
            return output
        if callable(self._output):
            return self._output(output)
        try:
            if isinstance(self._output, str) and not isinstance(output, Mapping):
                return getattr(output, self._output)
            return output[self._output]
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            has = list(output) if isinstance(output, Mapping) else type(output).__name__
            raise ProblemError(f"output={self._output!r} is not in the model's output, which is {has}") from error


@dataclass
class _Added:
    """The terms added to the loss of the data: a penalty and ½λ‖w‖²."""

    model: FlatModel
    penalty: Penalty | None
    weight_decay: float

    def __bool__(self) -> bool:
        return self.penalty is not None or self.weight_decay > 0

    def __call__(self, w: Tensor) -> Tensor:
        total = w.new_zeros(())
        if self.weight_decay:
            total = total + 0.5 * self.weight_decay * w.square().sum()
        if self.penalty is not None:
            extra = self.penalty(self.model.parameters(w))
            if not isinstance(extra, Tensor) or extra.shape != ():
                what = list(extra.shape) if isinstance(extra, Tensor) else type(extra).__name__
                raise ProblemError(f"penalty gives a scalar tensor from the parameters by name, not {what}")
            total = total + extra
        return total


@dataclass
class _BatchLoss:
    """The loss of some examples, plus the added terms."""

    loss: _Loss
    added: _Added

    def __call__(self, pieces: tuple[Tensor, ...], data: Examples) -> Tensor:
        inputs, targets = data
        w = cast(Tensor, _Pieces(pieces))  # the model takes only slices of it
        value = self.loss.of(self.loss.outputs(w, inputs), targets)
        return value + self.added(torch.cat(pieces)) if self.added else value


class _Pieces:
    """Weights in place of one vector: its slices, by their first index."""

    def __init__(self, pieces: tuple[Tensor, ...]) -> None:
        ends = accumulate(len(piece) for piece in pieces)
        self._found = {end - len(piece): piece for end, piece in zip(ends, pieces, strict=True)}

    def __getitem__(self, where: slice) -> Tensor:
        return self._found[where.start]


@dataclass
class _Chunk:
    """The loss of some examples, times a weight."""

    loss: _Loss
    inputs: Examples
    targets: Examples
    weight: float
    added: _Added | None = None

    def __call__(self, w: Tensor) -> Tensor:
        loss = self.loss.of(self.loss.outputs(w, self.inputs), self.targets)
        if self.weight != 1:
            loss = self.weight * loss
        return loss + self.added(w) if self.added else loss

    def install(self, w: Tensor) -> None:
        """Let the model compute with w."""
        self.loss.model.install(w)
