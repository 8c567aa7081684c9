"""A module that computes with the weights of a flat vector: a copy of the user's, which is never written to.

The copy's parameters are views of the vector that was installed last.  They stay in place after the forward pass,
because activation checkpointing and other saved-tensor hooks call the module again during the backward pass and need
the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from dvi.problems.errors import ProblemError


class FlatModel:
    """A private copy of a module, as a function of its trainable parameters, flat.

    A parameter shared by several modules counts once.  A complex parameter is stored in w as pairs (real, imaginary).
    The padding row of an embedding (``padding_idx``), which torch never moves, keeps its initial value: nothing depends
    on its entries of w.

    Args:
        model: the user's module.  It is copied, and not read afterwards.

    Attributes:
        module: the copy.
        w0: the parameters [d], in the order of ``model.named_parameters()``.
        shapes: the shape of each parameter by name, with a trailing 2 if it is complex.
        slices: the slice of w for each parameter by name.

    Raises:
        ProblemError: if there is nothing to train, if the module cannot be copied, or if it has parameters that no
            flow can move; the message says which, and gives a remedy.

    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise ProblemError(f"the model is an nn.Module, not a {kind}; of a function make dvi.Problem(loss, w0)")
        _refuse_wrappers(model)
        for path, p in model.named_parameters():
            _refuse_parameter(path, p)
        #: tensors of the copy that were computed from weights before it was made, by identity: (the tensor, in words)
        self.stale: dict[int, tuple[Tensor, str]] = {}
        self.module = _private_copy(model, self.stale)
        trained = {path: p for path, p in self.module.named_parameters() if p.requires_grad}
        if not trained:
            raise ProblemError(f"{type(model).__name__} has no parameter with requires_grad=True: nothing to train")
        _refuse_mixture([*self.module.named_parameters(), *self.module.named_buffers()])
        self.complex = {path for path, p in trained.items() if p.is_complex()}
        real = {path: _as_real(p.detach()) for path, p in trained.items()}
        self.shapes = {path: p.shape for path, p in real.items()}
        self.slices: dict[str, slice] = {}
        end = 0
        for path, x in real.items():
            self.slices[path] = slice(end, end := end + x.numel())
        self.w0 = torch.cat([p.reshape(-1) for p in real.values()])
        #: the dictionaries, and their keys, in which modules store each parameter
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {path: [] for path in trained}
        names = {id(p): path for path, p in trained.items()}
        for module in self.module.modules():
            for key, held in module._parameters.items():
                if held is not None and id(held) in names:
                    self._places[names[id(held)]].append((module._parameters, key))
        self._buffers = {path: buffer.clone() for path, buffer in self.module.named_buffers()}
        #: parameters with constant rows: (those rows, all values)
        self._held: dict[str, tuple[Tensor, Tensor]] = {}
        #: embeddings whose padding row is shared with another module: (path, padding_idx)
        self._shared_padding: dict[str, int] = {}
        for path, module in self.module.named_modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                module.sparse = False  # the layout of a gradient, not its values
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and id(module.weight) in names:
                name = names[id(module.weight)]
                if len(self._places[name]) > 1:
                    self._shared_padding[path] = module.padding_idx
                else:
                    row = torch.zeros(len(module.weight), 1, dtype=torch.bool, device=module.weight.device)
                    row[module.padding_idx] = True
                    self._held[name] = (row, module.weight.detach().clone())

    def parameters(self, w: Tensor) -> dict[str, Tensor]:
        """The parameters by name, as functions of w [d]."""
        found = {}
        for path, where in self.slices.items():
            value = w[where].view(self.shapes[path])
            if path in self.complex:
                value = torch.complex(value[..., 0], value[..., 1])
            if path in self._held:
                rows, fixed = self._held[path]
                value = torch.where(rows, fixed, value)
            found[path] = value
        return found

    def install(self, w: Tensor) -> None:
        """Let the copy compute with w [d] from now on."""
        for path, value in self.parameters(w).items():
            for owner, key in self._places[path]:
                owner[key] = value

    def fixed(self) -> dict[str, Tensor]:
        """The buffers and the parameters that are not trained, by name."""
        tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {path: tensor for path, tensor in tensors if path not in self.slices}

    def changed_buffers(self) -> list[str]:
        """The buffers that have changed since the copy was made."""
        now = dict(self.module.named_buffers())
        return [path for path, old in self._buffers.items() if path not in now or not _same(now[path], old)]

    @contextmanager
    def padding_looked_at(self) -> Iterator[None]:
        """In this context, an embedding that shares its padding row with another module refuses to look that row up.

        torch leaves the row out of the embedding's gradient but not out of the other module's.  The result would not be
        the gradient of any loss.
        """
        with ExitStack() as hooks:
            for path, padding in self._shared_padding.items():

                def look(_: nn.Module, args: Any, kwargs: Any, path: str = path, padding: int = padding) -> None:
                    tokens = pytree.tree_leaves((args, kwargs))[0]
                    if bool((tokens == padding).any()):
                        raise ProblemError(
                            f"module {path} (Embedding) has padding_idx={padding}, shares its weight "
                            "with another module, and padding occurs in the inputs: torch's gradient of that row is "
                            "the gradient of no loss. Set padding_idx=None, or do not tie the weights, or leave "
                            "padding out"
                        )

                module = self.module.get_submodule(path)
                hooks.enter_context(module.register_forward_pre_hook(look, with_kwargs=True))
            yield

    def attribute_of(self, leaf: Tensor) -> str | None:
        """The place, in words, where a module stores this tensor without registering it."""
        for path, name, x in _unregistered(self.module):
            if x is leaf:
                kind = type(self.module.get_submodule(path)).__name__
                return (
                    f"{name} of {path or 'the model'} ({kind}), which is not registered "
                    "(nn.ParameterList and nn.ParameterDict register what a list and a dict do not)"
                )
        return None

    @contextmanager
    def traced(self, stack: list[str]) -> Iterator[None]:
        """In this context, ``stack`` holds descriptions of the modules whose forward passes are running, outermost
        first.
        """

        def leave(*_: Any) -> None:
            stack.pop()

        with ExitStack() as hooks:
            hooks.callback(stack.clear)
            for path, module in self.module.named_modules():
                words = f"module {path or '(the model itself)'} ({type(module).__name__})"

                def enter(*_: Any, words: str = words) -> None:
                    stack.append(words)

                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(leave, always_call=True))
            yield

    def find_random_module(self, run: Callable[[], object]) -> str | None:
        """The innermost module that gives two results for the same input, in words; None if there is none.

        Args:
            run: a forward pass, which is called twice.

        """
        passes: list[list[tuple[str, Any, Any]]] = []
        for _ in range(2):
            calls: list[tuple[str, Any, Any]] = []
            with ExitStack() as hooks:
                for path, module in self.module.named_modules():

                    def record(
                        module: nn.Module, args: Any, kwargs: Any, out: Any, path: str = path, calls: Any = calls
                    ) -> None:
                        mode = ", in training mode" if module.training else ""
                        words = f"{path or 'the model itself'} ({type(module).__name__}{mode})"
                        calls.append((words, *pytree.tree_map(_snapshot, ((args, kwargs), out))))

                    hooks.enter_context(module.register_forward_hook(record, with_kwargs=True))
                run()
            passes.append(calls)
        for (words, given, out), (_, given_again, out_again) in zip(*passes, strict=False):
            if _all_same(given, given_again) and not _all_same(out, out_again):
                return str(words)
        return None

    def load_into(self, model: nn.Module, w: Tensor) -> None:
        """Write w [d] into the parameters of ``model``: the user's module, or one of the same structure."""
        targets = dict(model.named_parameters())
        for path, shape in self.shapes.items():
            expected = shape[:-1] if path in self.complex else shape
            if path not in targets or targets[path].shape != expected:
                found = f"has shape {list(targets[path].shape)}" if path in targets else "is missing"
                raise ProblemError(f"parameter {path} should have shape {list(expected)}, but {found} in this model")
        with torch.no_grad():
            for path, value in self.parameters(w.detach()).items():
                targets[path].copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the graph of the last computation."""
        self.install(self.w0)
        return self.__dict__


def kept_tensors(model: nn.Module) -> dict[int, str]:
    """Tensors that modules store without registering them: {identity: description}."""
    return {id(x): f"the tensor {name} that {path or 'the model'} keeps" for path, name, x in _unregistered(model)}


#: The attributes that every module has.
_INTERNAL = frozenset(vars(nn.Module()))


def _unregistered(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(path of the module, name of the attribute, tensor) for all tensors that are neither parameters nor buffers."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _INTERNAL:
                yield from ((path, name, x) for x in pytree.tree_leaves(value) if isinstance(x, Tensor))


def _private_copy(model: nn.Module, stale: dict[int, tuple[Tensor, str]]) -> nn.Module:
    # A tensor that a hook keeps on its module (the old weight_norm) has a history, which deepcopy refuses to copy.
    memo: dict[int, Any] = {}
    for path, name, x in _unregistered(model):
        if not x.is_leaf:
            memo[id(x)] = x.detach().clone()
            stale[id(memo[id(x)])] = memo[id(x)], f"the tensor {name} of {path or 'the model'}"
    own = {id(module) for module in model.modules()}
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if id(getattr(hook, "__self__", None)) not in own:  # the user may read the results of a recorder
                memo[id(hook)] = hook
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the user's classes raise
        raise ProblemError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and a problem works on a copy "
            "so that your model is never written to. Take out of the module what copy.deepcopy cannot copy (open "
            "files, locks, generators), or write the loss yourself: dvi.Problem(loss, w0)"
        ) from error


def _refuse_wrappers(model: nn.Module) -> None:
    for path, module in model.named_modules():
        where = f"{path or 'the model'} is a {type(module).__name__}"
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ProblemError(f"{where}, which has no second derivatives: hand over what it wraps, model.module")
        if isinstance(module, torch.jit.ScriptModule):
            raise ProblemError(f"{where} (TorchScript), whose weights cannot be replaced: hand over the Python module")
        if hasattr(module, "_orig_mod"):
            raise ProblemError(f"{where} (torch.compile), which has no second derivatives: hand over the module itself")


def _refuse_parameter(path: str, p: Tensor) -> None:
    if is_lazy(p):
        raise ProblemError(f"parameter {path} is lazy and has no shape yet: run the model once on some inputs first")
    if p.is_meta:
        raise ProblemError(f"parameter {path} is on the meta device and has no values: load or initialise it first")
    if p.layout is not torch.strided:
        raise ProblemError(f"parameter {path} is stored as {p.layout}: make it dense first (p.to_dense())")
    if p.requires_grad and (p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)):
        raise ProblemError(
            f"parameter {path} has a hook on its gradient: what it does is not part of the loss. Remove the hook "
            "(handle.remove()); a penalty on the weights goes into penalty= or weight_decay="
        )


def _refuse_mixture(tensors: list[tuple[str, Tensor]]) -> None:
    kinds: dict[tuple[torch.dtype, torch.device], str] = {}
    for path, tensor in tensors:
        if tensor.is_floating_point() or tensor.requires_grad:  # complex constants are promoted
            kinds.setdefault((tensor.dtype.to_real(), tensor.device), path)
    if len(kinds) > 1:
        listed = ", ".join(f"{path} is {dtype} on {device}" for (dtype, device), path in kinds.items())
        raise ProblemError(f"parameters and buffers of one dtype on one device are needed: {listed}")


def _snapshot(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True  # other objects cannot be compared
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _all_same(a: Any, b: Any) -> bool:
    some, others = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(some) == len(others) and all(_same(x, y) for x, y in zip(some, others, strict=True))
