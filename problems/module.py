"""Any ``nn.Module`` as a loss of its flat parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dvi.problems.errors import ProblemError
from dvi.problems.examples import Examples, count, find_reduction, refuse_different, take
from dvi.problems.locate import name_culprit
from dvi.problems.outputs import curvature
from dvi.problems.problem import Backend, Problem

Criterion = Callable[[Any, Any], Tensor]


class ModuleProblem(Problem):
    """The loss ``criterion(model(inputs), targets)`` as a function of the model's trainable parameters, flat.

    The model is never written to: its parameters and buffers are read once, and further training of it does not
    change the problem.  Parameters with ``requires_grad=False`` keep their value; a parameter shared by several
    modules counts once.

    Args:
        model: a deterministic module.  Its dtype and device are the problem's.
        criterion: ``(outputs, targets) -> []``; where the data are taken in chunks, a mean or a sum over examples.
        inputs: a tensor [n, ...], or a tuple of them for a model of several arguments.
        targets: a tensor [n, ...], or a tuple of them, handed to the criterion as they are.
        chunk_size: how many examples to take at a time; None for all at once.  The derivatives are the same up to
            rounding, the memory that of one chunk.
        derivatives, max_directions, name: as in :class:`Problem`.

    Attributes:
        parameter_slices: where each parameter lies in w, by name.
        parameter_shapes: its shape, by name.

    Raises:
        ProblemError: if the model has nothing to train, mixes dtypes or devices, is stochastic, changes its buffers or
            couples examples that are to be taken in chunks; if the data do not fit; if the criterion is to be taken in
            chunks and is neither a mean nor a sum over examples.

    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        inputs: Examples,
        targets: Examples,
        chunk_size: int | None = None,
        *,
        derivatives: Backend = "autodiff",
        max_directions: int = 1,
        name: str | None = None,
    ) -> None:
        self._model = model
        self._criterion = criterion
        # Kept to be asked again: a model may be put in training mode after the problem was made.
        self._volatile = {path: why for path, module in model.named_modules() if (why := _volatility(module))}
        self._refuse_training_mode()
        parameters = {path: p.detach().clone() for path, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ProblemError(f"{type(model).__name__} has no parameter with requires_grad=True: nothing to train")
        self._fixed: dict[str, Tensor] = {
            path: tensor.detach().clone()
            for path, tensor in [*model.named_parameters(), *model.named_buffers()]
            if path not in parameters
        }
        _refuse_mixture({**parameters, **self._fixed})
        self.parameter_shapes = {path: p.shape for path, p in parameters.items()}
        self.parameter_slices: dict[str, slice] = {}
        end = 0
        for path, p in parameters.items():
            self.parameter_slices[path] = slice(end, end := end + p.numel())
        w0 = torch.cat([p.reshape(-1) for p in parameters.values()])

        n = count(inputs, "inputs", w0)
        if count(targets, "targets", w0, any_dtype=True) != n:
            raise ProblemError(f"{n} inputs but {count(targets, 'targets', w0, any_dtype=True)} targets")
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ProblemError(f"chunk_size counts examples, at least 1; got {chunk_size!r}")
        self._inputs, self._targets = inputs, targets
        self._chunk_size = min(chunk_size or n, n)
        super().__init__(
            self._chunks(w0, n),
            w0,
            derivatives=derivatives,
            max_directions=max_directions,
            name=name or type(model).__name__,
        )
        self._refuse_changed_buffers()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the model's trainable parameters, in the order in which they lie in w."""
        return tuple(tuple(shape) for shape in self.parameter_shapes.values())

    def outputs(self, w: Tensor, inputs: Examples) -> Any:
        """Return what the model with weights ``w`` [d] makes of ``inputs`` (a tensor [n, ...] or a tuple of them).

        Raises:
            ProblemError: if an argument is not of the right shape, dtype and device.

        """
        self._check_weights(w)
        count(inputs, "inputs", self.w0)
        with torch.no_grad():
            return self._forward(w.detach(), inputs)

    def output_curvature(self, w: Tensor, inputs: Examples, U: Tensor, X: Tensor) -> Tensor:
        """Half the second directional derivatives ½⟨∇²h, U X Uᵀ⟩ of every output h, in the outputs' shape.

        Where the weights oscillate about w with covariance Σ = U X Uᵀ, the outputs are on average h(w) plus this.
        The model's output has to be one tensor.

        Args:
            w: weights [d].
            inputs: a tensor [n, ...] or a tuple of them; taken ``chunk_size`` at a time.
            U: directions [d, k].
            X: their symmetric weights [k, k], of any signature.

        Raises:
            ProblemError: if an argument is not of the right shape, dtype and device.
            DerivativeError: if the model has no second derivative.

        """
        self._check_weights(w)
        self._check_block(U, "U")
        weights, directions = self._principal_directions(U, X)
        n = count(inputs, "inputs", self.w0)
        chunks = [take(inputs, slice(a, a + self._chunk_size)) for a in range(0, n, self._chunk_size)]
        return torch.cat(
            [
                curvature(partial(self._forward, inputs=chunk), w, directions, weights, self.derivatives)
                for chunk in chunks
            ]
        )

    def load_into(self, model: nn.Module, w: Tensor) -> None:
        """Write flat weights ``w`` [d] into the parameters of ``model``, which is the problem's or one like it.

        Raises:
            ProblemError: if ``w`` or the model's parameters do not fit.

        """
        self._check_weights(w)
        targets = dict(model.named_parameters())
        for path, shape in self.parameter_shapes.items():
            if path not in targets or targets[path].shape != shape:
                found = f"has shape {list(targets[path].shape)}" if path in targets else "is missing"
                raise ProblemError(f"parameter {path} should have shape {list(shape)}, but {found} in this model")
        with torch.no_grad():
            for path, value in self._unflatten(w.detach()).items():
                targets[path].copy_(value)

    def _chunks(self, w0: Tensor, n: int) -> list[Callable[[Tensor], Tensor]]:
        """Return the loss as a sum over chunks of examples."""
        size = self._chunk_size
        if size == n:
            return [self._part(slice(0, n), 1.0)]
        chunks = [slice(a, min(a + size, n)) for a in range(0, n, size)]

        def loss_of(examples: slice) -> float:
            with torch.no_grad():
                return float(self._part(examples, 1.0)(w0))

        reduction = find_reduction(loss_of, n)
        parts = [self._part(chunk, ((chunk.stop - chunk.start) / n) ** reduction) for chunk in chunks]
        with torch.no_grad():
            outputs = [self._forward(w0, take(self._inputs, chunk)) for chunk in chunks]
            if all(isinstance(out, Tensor) for out in outputs):
                # The reduction was found on a few examples; padding or class weights may show only on others.
                whole = float(self._criterion(torch.cat(outputs), self._targets))
                refuse_different(sum(float(part(w0)) for part in parts), whole)
        return parts

    def _part(self, examples: slice, weight: float) -> Callable[[Tensor], Tensor]:
        inputs, targets = take(self._inputs, examples), take(self._targets, examples)

        def part(w: Tensor) -> Tensor:
            loss = self._criterion(self._forward(w, inputs), targets)
            return loss if weight == 1 else weight * loss

        return part

    def _forward(self, w: Tensor, inputs: Examples) -> Any:
        self._refuse_training_mode()
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        return functional_call(self._model, {**self._fixed, **self._unflatten(w)}, arguments)

    def _unflatten(self, w: Tensor) -> dict[str, Tensor]:
        return {path: w[where].view(self.parameter_shapes[path]) for path, where in self.parameter_slices.items()}

    def _blame(self, w: Tensor) -> str:
        return name_culprit(
            self._model,
            {**self._fixed, **self._unflatten(w)},
            self._criterion,
            # A few examples are faster; all of them are right where data are not a list of examples.
            [(take(self._inputs, some), take(self._targets, some)) for some in (slice(0, 8), slice(None))],
        )

    def _refuse_training_mode(self) -> None:
        for path, why in self._volatile.items():
            module = self._model.get_submodule(path)
            if module.training:
                raise ProblemError(
                    f"{path or 'the model'} ({type(module).__name__}) is in training mode and {why}; "
                    "a flow needs a deterministic loss: call model.eval() first"
                )

    def _refuse_changed_buffers(self) -> None:
        originals = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        for path, tensor in self._fixed.items():
            if not torch.equal(tensor, originals[path]):
                raise ProblemError(f"a forward pass changes the buffer {path}: the loss is not a function of w alone")


def _volatility(module: nn.Module) -> str | None:
    """Why this module, in training mode, makes no function of its weights alone."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.track_running_stats:
            return None
        return "normalises by the batch and updates running statistics"
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        return f"drops at random (p={module.p})"
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0:
        return f"drops at random (dropout={module.dropout})"
    if isinstance(module, nn.RReLU):
        return "draws its slopes at random"
    return None


def _refuse_mixture(tensors: dict[str, Tensor]) -> None:
    kinds: dict[tuple[torch.dtype, torch.device], str] = {}
    for path, tensor in tensors.items():
        if tensor.is_floating_point():
            kinds.setdefault((tensor.dtype, tensor.device), path)
    if len(kinds) > 1:
        listed = ", ".join(f"{path} is {dtype} on {device}" for (dtype, device), path in kinds.items())
        raise ProblemError(f"parameters and buffers of one dtype on one device are needed: {listed}")
