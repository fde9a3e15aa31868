"""The network as a function of its trainable parameters, and what is said about batches."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .batches import Inputs, Picked, call, num_samples, rows
from .copies import Cast
from .numerics import BROKEN, eager, native_recurrence, plain_attention, repeatable
from .view import NoShortcuts, View

log = logging.getLogger(__name__)

Basis = Mapping[str, Tensor]  # parameter name -> (K, *shape)
Forward = Callable[[nn.Module, Inputs], Tensor]


SHORTCUTS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
Parameters = str | Collection[str] | Callable[[str, nn.Parameter], bool] | None


def chosen_names(model: nn.Module, parameters: Parameters) -> list[str] | None:
    """Names of the parameters that a pattern (as of files), several patterns or a predicate choose; None for None.

    Raises:
        ValueError: if they choose none.
    """
    if parameters is None:
        return None
    patterns = [parameters] if isinstance(parameters, str) else parameters

    def wanted(name: str, parameter: nn.Parameter) -> bool:
        return patterns(name, parameter) if callable(patterns) else any(fnmatchcase(name, one) for one in patterns)

    named = list(model.named_parameters())
    first = {parameter: name for name, parameter in named}  # tied ones may be called by any of their names
    names = [
        *dict.fromkeys(
            first[parameter]
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if wanted(name, parameter) and (parameter.is_floating_point() or parameter.is_complex())
        )
    ]
    if not names:
        some = ", ".join(name for name, _ in named[-3:])
        raise ValueError(f"parameters={parameters!r} chooses none of the network's parameters (…, {some}).")
    return names


@contextmanager
def as_values() -> Iterator[None]:
    """Evaluate networks for their outputs alone, in this thread.

    No graph is recorded, inference mode is off (forward-mode products are silently zero there in some releases of
    torch), and so is autocast; what was compiled runs eagerly.
    """
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", "cuda"} | ({accelerator.type} if accelerator else set()):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(eager())
        yield


@contextmanager
def as_function() -> Iterator[None]:
    """Evaluate networks as plain functions of parameters and inputs, in this thread: `as_values` that can be derived.

    Attention is by a kernel that can be differentiated, and cuDNN chooses none by the clock.
    """
    with ExitStack() as stack:
        stack.enter_context(as_values())
        stack.enter_context(plain_attention())
        if torch.cuda.is_initialized():
            stack.enter_context(repeatable())
        yield


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., Any], *, with_kwargs: bool = False) -> Iterator[None]:
    """Call `hook(module, args, [kwargs,] output)` after each call of a module; scripted ones take no hooks."""
    handles = []
    try:
        for module in modules:
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_hook(hook, with_kwargs=with_kwargs))
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what a `kind` does, its hooks aside."""
    return isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module)


class Network:
    """`forward(model, ·)` as a function of some parameters of `model`: `names`, or those that require gradients.

    It is evaluated on a view of the model, in eval mode, which shares its storage.

    Args:
        model: the user's network, which is only read.
        forward: how to call it.
        names: of the parameters; None takes those that require gradients.
        cast: what becomes of each of its tensors.

    Raises:
        ValueError: if there are none, or if they are neither float32 nor float64.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward = call,
        names: Collection[str] | None = None,
        cast: Cast = lambda _, value: value,
    ):
        self._look_through: Callable[..., View] = partial(View, model, names, cast)
        self._users_forward = forward
        try:
            self._see(self._look_through())
        except RecursionError:  # objects that lead from one to the next, without end
            self._see(self._look_through(changing=frozenset()))
        self._settled = False
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        self._kernels = native_recurrence if recurrent and torch.cuda.is_available() else nullcontext
        self.watch: Callable[[], AbstractContextManager] = nullcontext  # over each evaluation
        self.output_shape: tuple[int, ...] | None = None  # of the last outputs, without B
        if not self.names:
            raise ValueError(
                "no parameter of the network has requires_grad=True, so there is nothing to be uncertain about: "
                "set requires_grad=True on the ones that ELLA should take into account."
            )
        for parameter, name in self.names.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                fix = "call model.float(), or train with precision='bf16-mixed'"
                if parameter.is_complex():
                    fix = "keep its real and imaginary parts, and use torch.view_as_complex(weight) in forward()"
                raise ValueError(f"ELLA needs float32 or float64 weights, but {name} is {parameter.dtype}: {fix}.")

    def _see(self, view: View) -> None:
        """Evaluate the network on this view from now on."""
        self.view, self.model = view, view.root
        # What a closure knows of the network is the view's.
        self._forward: Forward = view.copied.following(self._users_forward)
        parameters = view.root.named_parameters()
        self.names: dict[Tensor, str] = {value: name for name, value in parameters if value.requires_grad}

    def __call__(self, inputs: Inputs) -> Tensor:
        """Outputs (B, C), by operations that can be differentiated; those of several positions one after the other."""
        with NoShortcuts(), self._kernels(), self.watch():
            return self._evaluate(inputs)

    def own(self, inputs: Inputs) -> Tensor:
        """Outputs (B, C) as the network gives them in eval mode, by whatever shortcut it takes without gradients."""
        with torch.no_grad():
            return self._evaluate(inputs)

    def outputs_of(self, inputs: Inputs) -> Tensor:
        """Outputs for a batch whose size is not known, (B, …).

        Raises:
            ValueError: if they are no tensor with rows.
        """
        with torch.no_grad():
            outputs = self._called(inputs)
        return check_outputs(outputs, len(outputs) if isinstance(outputs, Tensor) and outputs.ndim else 1)

    @property
    def takes_shortcuts(self) -> bool:
        """Whether what it computes without gradients may be another function: padding, in torch's transformers."""
        return any(isinstance(module, SHORTCUTS) for module in self.model.modules())

    def settle(self, inputs: Inputs) -> None:
        """Find out, once, what evaluating the network writes to."""
        if not self._settled:
            self._settled = True
            few = rows(inputs, slice(0, 2))
            with torch.no_grad():
                if self.view.copied.copies_objects:
                    whole = few.whole if isinstance(few, Picked) else few
                    changing = self.view.changed_by(lambda: self._forward(self.model, whole))
                    self._see(self._look_through(changing=changing))
                self.view.settle(lambda: self._called(few))

    def at_positions(self, flat: Tensor, axis: int | None) -> Tensor:
        """What belongs to the outputs of the last call, (B, D, …), as (B, *, C, …): the C are at `axis`."""
        if axis is None or self.output_shape is None:
            return flat
        last = len(self.output_shape)
        return flat.unflatten(1, self.output_shape).movedim(last if axis == -1 else axis, last)

    def at(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """Outputs (B, C) with some `parameters` replaced."""
        with self.view.replaced(parameters):
            return self(inputs)

    @property
    def parameters_taken(self) -> dict[str, Tensor]:
        """The parameters taken into account, by name, without their graph."""
        return {name: parameter.detach() for parameter, name in self.names.items()}

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(parameter.numel() for parameter in self.names)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.names)).device

    def _evaluate(self, inputs: Inputs) -> Tensor:
        outputs = self._of_samples(inputs, num_samples(inputs))
        if outputs.dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(outputs.device.type):
            outputs = outputs.float()  # of a frozen part in half precision
        self.output_shape = tuple(outputs.shape[1:])
        return outputs.flatten(1) if outputs.ndim > 1 else outputs.unsqueeze(1)

    def _of_samples(self, inputs: Inputs, count: int) -> Tensor:
        """Outputs (B, …); a network that ends in `.squeeze()` leaves out a B of one."""
        outputs = self._called(inputs)
        if count != 1 or not isinstance(outputs, Tensor) or (outputs.ndim > 0 and len(outputs) == 1):
            return check_outputs(outputs, count)
        if self.output_shape is None:
            self.output_shape = tuple(check_outputs(self._called(twice(inputs)), 2).shape[1:])
        return outputs.unsqueeze(0) if outputs.shape == self.output_shape else check_outputs(outputs, 1)

    def _called(self, inputs: Inputs) -> Any:
        """What the network gives, or what has it as `.logits` (Hugging Face) or `.prediction` (pytorch-forecasting)."""
        try:
            outputs = self._forward(self.model, inputs.whole if isinstance(inputs, Picked) else inputs)
        except BROKEN:
            raise
        except Exception as error:
            error.add_note(
                f"ELLA called {'module(inputs)' if self._forward is call else 'forward(module, inputs)'} with inputs: "
                f"{described(inputs)}. If that is not how the network is called, pass forward=lambda module, inputs: "
                "…, or unpack=lambda batch: (inputs, targets) with what your training_step does to a batch: "
                "(batch, targets) if forward() takes the whole of it."
            )
            raise
        finally:
            self.view.restore()
        outputs = getattr(outputs, "logits", getattr(outputs, "prediction", outputs))
        return outputs[inputs.rows] if isinstance(inputs, Picked) and isinstance(outputs, Tensor) else outputs


def described(inputs: Inputs) -> str:
    """Kinds and shapes of inputs, in a few words."""
    if isinstance(inputs, Picked):
        return described(inputs.whole)
    if isinstance(inputs, Tensor):
        return f"{tuple(inputs.shape)} {str(inputs.dtype).removeprefix('torch.')}"
    if isinstance(inputs, Mapping):
        return "a dict of " + ", ".join(f"{name} {described(value)}" for name, value in inputs.items())
    if isinstance(inputs, (list, tuple)):
        return f"a {type(inputs).__name__} of " + ", ".join(map(described, inputs))
    return f"a {type(inputs).__name__}"


def check_outputs(outputs: Any, batch_size: int) -> Tensor:
    """Return `outputs` if they are (B, …) real numbers; raise a ValueError that names the fix if not."""
    if batch_size == 0:
        raise ValueError("the batch has no inputs: leave it out.")
    if not isinstance(outputs, Tensor):
        fixes = {dict: "model(inputs)['logits']", tuple: "model(inputs)[0]", list: "model(inputs)[0]"}
        fix = next((way for kind, way in fixes.items() if isinstance(outputs, kind)), "model(inputs).outputs")
        raise ValueError(
            f"the network must give a tensor of ({batch_size}, …) outputs for {batch_size} inputs, but it gives "
            f"{described(outputs)}: say which part of it, such as forward=lambda model, inputs: {fix}."
        )
    if not outputs.is_floating_point():
        raise ValueError(
            f"the network gives {described(outputs)}, which have no gradient (the likeliest classes?): pass a forward= "
            "that gives what they are made of, such as the logits."
        )
    if outputs.ndim == 0 or len(outputs) != batch_size or not outputs.numel():
        raise ValueError(
            f"the network must map {batch_size} inputs to ({batch_size}, …) outputs, but it gives "
            f"{tuple(outputs.shape)}: samples must be along the first axis, so pass a forward= that puts them there "
            "(forward=lambda model, inputs: model(inputs).transpose(0, 1)), or an unpack= that gives such inputs."
        )
    return outputs


def channel_axis(outputs: tuple[int, ...] | None, channels: str) -> int | None:
    """Where the network's outputs (B, *outputs) have their C; None for (B,).

    "auto" takes the last axis of (B, C) and (B, L, C), and the first after B of (B, C, H, W).
    """
    if not outputs:
        return None
    return {"auto": 1 if len(outputs) > 2 else -1, "first": 1, "last": -1}[channels]


def check_finite(logits: Tensor) -> Tensor:
    """Return `logits` if they are finite; raise a ValueError that names the fix if not."""
    if not logits.isfinite().all():
        raise ValueError(
            "the network's outputs are NaN or infinite: check its weights (a diverged training?) and the inputs."
        )
    return logits


def version(tensor: Tensor) -> int:
    """Changes whenever `tensor` is written to; an inference tensor does not count that."""
    return 0 if tensor.is_inference() else tensor._version


def twice(inputs: Inputs) -> Inputs:
    """A batch of one sample, with it a second time."""
    return tree_map(lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim else leaf, inputs)
