"""Which way to differentiate, and how much at a time.

Both are chosen from the sizes of the network's activations and the memory budget, never from a clock, so that a seed
and a budget fix the result to the last bit. To add an engine, write a class with `features(inputs, basis)`, and name it
in `ENGINES` and `_engine`.
"""

import logging
import operator
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .batches import Inputs, Picked, call, num_samples, rows, slices
from .chunks import chunks
from .copies import Cast
from .folding import UNFOLDED, Folding, StaleError, find_folding
from .forward_mode import ForwardMode, Reduce
from .layerwise import MAX_COTANGENTS, Cotangents, Footprint, Layerwise
from .linearize import Basis, Forward, Network, channel_axis, check_finite, version
from .memory import free_memory, give_back, keeping_pages
from .numerics import BROKEN, WITHOUT_FLOAT64, centred
from .top import Selection

log = logging.getLogger(__name__)

ENGINES = ("auto", "forward", "layerwise")
PRECISIONS = ("full", "bf16")
TANGENTS = 20  # that go through the network at a time

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """What a forward pass of one sample takes."""

    num_outputs: int  # C
    held: int  # bytes that autograd saves, whichever functions they are for, inputs of layers, and twice the largest
    cotangent: int  # bytes that a cotangent adds: of the outputs of layers with a rule
    largest: int  # bytes of the largest activation


class Linearization:
    """First-order view of a network around its weights, over the parameters with `requires_grad`, or over `names`.

    Use it inside `as_function()`, in one thread at a time.

    Args:
        model: the network; `forward(model, inputs)` must give (B, C) outputs, each row of its own input alone.
        forward: how to call it.
        names: of the parameters to take into account, if not those that require gradients.
        engine: "forward" for forward-mode products, "layerwise" for reverse mode, "auto" for the cheaper one.
        precision: "full" for that of the weights, "bf16" to compute features (not the outputs) under autocast.
        samples_per_chunk: inputs that go through the network at a time; None chooses.
        tangents_per_chunk: tangents that go through it at a time; None chooses.
        memory_budget: bytes that may be used beyond the network and the basis; None takes a quarter of what is free.
        channels: where outputs of several positions have their C: "first", "last" or "auto".
        cast: what becomes of each of the network's tensors.

    Raises:
        ValueError: if there is no such parameter, or if the network is on several devices or on one without float64.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward = call,
        *,
        names: Collection[str] | None = None,
        engine: str = "auto",
        precision: str = "full",
        samples_per_chunk: int | None = None,
        tangents_per_chunk: int | None = None,
        memory_budget: int | None = None,
        channels: str = "auto",
        cast: Cast = lambda _, value: value,
    ):
        _check_devices(model)
        self.channels = channels
        self.network = Network(model, forward, names, cast)
        self.choice, self.precision = engine, precision
        self.samples_per_chunk, self.tangents_per_chunk = samples_per_chunk, tangents_per_chunk
        self.memory_budget = memory_budget or free_memory(self.network.device) // 4
        self._dtype = torch.bfloat16 if precision == "bf16" else None
        self.layerwise = Layerwise(self.network)
        self._sizes: dict[bool, Sizes] = {}  # by whether the network is folded
        self._fitting_samples = sys.maxsize  # fewer once so many have not fitted the memory
        self._folding: Folding | None = None
        self._folded: Basis | None = None
        self._folded_from: list[Tensor] = []
        self._folded_versions: list[int] = []
        self._engines: dict[int, ForwardMode | Layerwise] = {}  # by rank

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters taken into account, by name."""
        return self.network.parameters_taken

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.network.device

    def logits(self, inputs: Inputs) -> Tensor:
        """Outputs (B, C) of the network as it is.

        Raises:
            ValueError: if the output is not (B, …) or not finite.
        """
        self.network.settle(inputs)
        return check_finite(self.network.own(inputs))

    @property
    def axis(self) -> int | None:
        """Where the outputs of the last call have their C."""
        return channel_axis(self.network.output_shape, self.channels)

    def affordable(self, inputs: Inputs, columns: int) -> list[slice]:
        """Samples whose features with so many columns, and a copy of them in float64, fit the memory budget."""
        one = 3 * self.sizes(inputs).num_outputs * columns * next(iter(self.parameters.values())).element_size()
        return slices(num_samples(inputs), max(1, self.memory_budget // 4 // one))

    def recordable(self, inputs: Inputs, times: int = 1) -> list[slice]:
        """Samples whose activations fit the memory budget, so many times; those of a batched graph come together."""
        most = max(1, self.memory_budget // (4 * times * max(1, self.sizes(inputs).held)))
        return slices(num_samples(inputs), num_samples(inputs) if isinstance(inputs, Picked) else most)

    def at_positions(self, flat: Tensor) -> Tensor:
        """What belongs to the outputs of the last call, (B, D, …), as (B, *, C, …)."""
        return self.network.at_positions(flat, self.axis)

    def features(self, inputs: Inputs, basis: Basis) -> tuple[Tensor, Tensor]:
        """Outputs f(x), (B, C), and features Ψ(x) = J(x) V, (B, C, K)."""
        engine = self._engine(inputs, basis)
        logits, features = [], []
        with keeping_pages(self.device):
            most = self._samples_for_features(inputs, engine, basis)
            for chunk, (outputs, products) in self._in_parts(
                inputs, most, lambda chunk, _: self._differentiated(chunk, basis)
            ):
                asked_again = self.precision != "full" or self.network.takes_shortcuts
                logits.append(self.network.own(chunk) if asked_again else outputs)
                features.append(products.to(logits[-1].dtype))
        return check_finite(torch.cat(logits)), torch.cat(features)

    def look(
        self,
        inputs: Inputs,
        basis: Basis,
        top: int | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Selection | None]:
        """Outputs (B, *, C), features (B, *, C, K), and with `top` which k outputs they are of: C is then k + 1.

        At `temperature` the last of them stands for all others, and features are those of the outputs minus their mean:
        no probability depends on more.

        Where outputs have one position and k is small, k cotangents are pulled back: differences to the last output.
        Else the features of all outputs are held for one sample at a time, and for so many of the K directions as the
        memory budget allows.
        Log-probabilities of all others are kept only of the targets (B, *), if they are given.
        """
        if top is None:
            logits, features = map(self.at_positions, self.features(inputs, basis))
            return logits, features, None
        if self._pulls_back(inputs, top, len(next(iter(basis.values())))):
            outputs, products = self._pulled_back(
                inputs, lambda f, _: Selection.of(f, top, temperature).differences(), top, basis
            )
            selection = Selection.of(outputs, top, temperature)
            within = selection.indices if targets is None else selection.log_prob_within(targets)
            products = centred(nn.functional.pad(products, (0, 0, 0, 1)).to(outputs.dtype))  # the last one's are none
            return selection.logits(outputs), products, Selection(selection.indices, within)
        found = []
        with keeping_pages(self.device):
            for i in range(num_samples(inputs)):
                sample = rows(inputs, slice(i, i + 1))
                outputs = self.at_positions(self.logits(sample))
                selection = Selection.of(outputs, top, temperature)
                reduce = lambda _, products, selection=selection: selection.products(self.at_positions(products))  # noqa: E731
                _, products = self._differentiated(sample, basis, reduce)
                within = selection.indices if targets is None else selection.log_prob_within(targets[i : i + 1])
                products = centred(products.to(outputs.dtype))
                found.append((selection.logits(outputs), products, selection.indices, within))
        logits, features, indices, within = (torch.cat(part) for part in zip(*found, strict=True))
        return logits, features, Selection(indices, within)

    def gradients(self, inputs: Inputs, outputs: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield, a chunk of samples at a time, name -> ∇_θ f_c(x), (b, p), with c = `outputs[i]` at the i-th input."""

        def gradients(chunk: Inputs, part: slice) -> dict[str, Tensor]:
            # Sequences of other lengths have other numbers of outputs.
            chosen: Cotangents = lambda f: nn.functional.one_hot(outputs[part] % f.shape[1], f.shape[1]).unsqueeze(1)  # noqa: E731
            with keeping_pages(self.device):
                return self.layerwise.rows(chunk, chosen)

        for _, found in self._in_parts(inputs, self._samples(inputs, cotangents=1, hold_rows=True), gradients):
            yield {name: found.pop(name).squeeze(1) for name in self.parameters}

    def projections(
        self, inputs: Inputs, cotangents: Callable[[Tensor, slice], Tensor], basis: Basis
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, C), and vᵀ J(x) V, (B, K): one backward pass.

        v = `cotangents(outputs, part)`, (b, C), is asked for some of the samples at a time.
        """
        logits, projections = self._pulled_back(inputs, lambda f, part: cotangents(f, part).unsqueeze(1), 1, basis)
        return logits, projections.squeeze(1)

    def _pulled_back(
        self, inputs: Inputs, cotangents: Callable[[Tensor, slice], Tensor], count: int, basis: Basis
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, C), and products of `count` cotangents (b, S, C) of each sample with J V, (B, S, K)."""

        def pulled(chunk: Inputs, part: slice) -> tuple[Tensor, Tensor]:
            some: Cotangents = lambda outputs: cotangents(outputs, part)  # noqa: E731
            return self._folded_way(chunk, basis, partial(self.layerwise.products, chunk, some))

        with keeping_pages(self.device):
            most = self._samples(inputs, cotangents=count, folding=self._fold(inputs, basis)[0])
            found = [pair for _, pair in self._in_parts(inputs, most, pulled)]
        logits, products = (torch.cat(part) for part in zip(*found, strict=True))
        return check_finite(logits), products

    def sizes(self, inputs: Inputs, folding: Folding = UNFOLDED) -> Sizes:
        """Measure, once, what a forward pass of one of `inputs` takes."""
        folded = bool(folding.pairs)
        if folded not in self._sizes:
            if not num_samples(inputs):
                raise ValueError("the batch has no inputs: leave it out.")
            self.network.settle(inputs)
            self.layerwise.by_rule(inputs)
            self._sizes[folded] = self._measured(inputs, folding)
        return self._sizes[folded]

    def _measured(self, inputs: Inputs, folding: Folding) -> Sizes:
        """What two samples take beyond what one does: what is made of weights alone is there once."""
        few = [rows(inputs, torch.tensor(numbers)) for numbers in ([0], [0, 0])]  # of their own, no views of the rest
        try:
            one, two = self._footprints(few, folding)
        except StaleError:
            self._unfold()
            return self.sizes(inputs)
        held, outputs, cotangents = (
            [max(0, b - a) for a, b in zip(*each, strict=True)] if len(each[0]) == len(each[1]) else each[0]
            for each in zip(one[1:], two[1:], strict=True)
        )
        largest = max([*outputs, *held])
        return Sizes(one.num_outputs, sum(held) + 2 * largest, sum(cotangents), largest)

    def _footprints(self, few: list[Inputs], folding: Folding) -> list[Footprint]:
        try:
            return [self.layerwise.footprint(some, folding) for some in few]
        except (*BROKEN, StaleError):
            raise
        except Exception:  # what is saved cannot be seen in a network that has derivatives within itself
            return [self.layerwise.footprint(some, folding, watched=False) for some in few]

    def _in_parts(self, inputs: Inputs, samples: int, work: Callable[[Inputs, slice], T]) -> Iterator[tuple[Inputs, T]]:
        """So many samples at a time, with what `work` makes of them; half as many from where they do not fit."""
        done, total = 0, num_samples(inputs)
        while done < total:
            part = slices(total - done, min(samples, self._fitting_samples))[0]
            chunk = rows(inputs, part := slice(done, done + part.stop))
            if (found := self._if_it_fits(work, chunk, part)) is None:
                give_back()
                continue
            done = part.stop
            yield chunk, found

    def _if_it_fits(self, work: Callable[[Inputs, slice], T], chunk: Inputs, part: slice) -> T | None:
        """What `work` makes of a chunk, or None where half of it may do: what the error held is free by then."""
        try:
            return work(chunk, part)
        except torch.OutOfMemoryError as error:
            count = part.stop - part.start
            if count == 1:
                error.add_note("ELLA: this is one sample at a time: pass parameters= fewer of them, or a lower rank=.")
                raise
            self._fitting_samples = count // 2
            log.warning(
                "ELLA: %d samples at a time do not fit the memory of %s, so from here on it is %d: a lower "
                "memory_budget= takes fewer from the start, and fixes the result to the last bit.",
                *(count, self.device, count // 2),
            )
            return None

    def _differentiated(self, chunk: Inputs, basis: Basis, reduce: Reduce | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and features of a few samples, by the engine for this rank."""
        engine = self._engine(chunk, basis)

        def features(tangents: Basis, folding: Folding) -> tuple[Tensor, Tensor]:
            with self._autocast(engine):
                return engine.features(chunk, tangents, folding, reduce)

        try:
            return self._folded_way(chunk, basis, features)
        except BROKEN:
            raise
        except Exception as error:
            if engine is self.layerwise:
                raise
            # What forward mode has no rule for may come with the data.
            self._take(len(next(iter(basis.values()))), self.layerwise, f"no forward mode: {_first_line(error)}")
            return self._differentiated(chunk, basis, reduce)

    def _folded_way(self, inputs: Inputs, basis: Basis, way: Callable[[Basis, Folding], Any]) -> Any:
        """Go a way with folded tangents; without, for good, if these inputs leave the one that the folding is of."""
        folding, tangents = self._fold(inputs, basis)
        try:
            return way(tangents, folding)
        except StaleError:
            self._unfold()
            return way(basis, UNFOLDED)

    def _unfold(self) -> None:
        self._folding, self._folded, self._folded_from = UNFOLDED, None, []

    def _fold(self, inputs: Inputs, basis: Basis) -> tuple[Folding, Basis]:
        """Which BatchNorms to fold, and the tangents that go with it, if there is memory for them."""
        if self._folding is None:
            self._folding = find_folding(self.network, rows(inputs, slice(0, 1)), self.layerwise.by_rule(inputs))
        one, half = next(iter(basis.values())), self._dtype is not None
        beside = len(one) * (self._folding.numel * one.element_size() + half * 2 * self.network.num_parameters)
        if not (self._folding.pairs or half) or beside > self.memory_budget // 4:
            return UNFOLDED, basis
        # For small batches, folding takes longer than the rest. What was folded is held: its address may not be reused.
        versions = [version(tangents) for tangents in basis.values()]
        same = len(self._folded_from) == len(basis) and all(map(operator.is_, self._folded_from, basis.values()))
        if not same or versions != self._folded_versions:
            self._folded = None  # frees it before the next is made
            self._folded, self._folded_versions = self._halved(self._folding.tangents(basis)), versions
            self._folded_from = list(basis.values())
        assert self._folded is not None
        return self._folding, self._folded

    def _halved(self, basis: Basis) -> Basis:
        """Tangents in the type of the products that they go into: of matrices, where that is not the weights'."""
        return {name: part if part.ndim < 3 else part.to(self._dtype or part.dtype) for name, part in basis.items()}

    def _engine(self, inputs: Inputs, basis: Basis) -> ForwardMode | Layerwise:
        """The engine for features of this rank; forward mode only if the network has all its rules."""
        rank, outputs = len(next(iter(basis.values()))), self.sizes(inputs).num_outputs
        if rank not in self._engines:
            name = self.cheaper(inputs, rank)
            reason, engine = f"C = {outputs} outputs, {rank} directions", self.layerwise
            for dtype in dict.fromkeys((self._dtype, None)) if name == "forward" else ():
                fitting = max(1, min(TANGENTS, self.memory_budget // 4 // self.sizes(inputs).largest))
                forward = ForwardMode(self.network, min(rank, self.tangents_per_chunk or fitting), dtype)
                if (trouble := self._trouble(forward, inputs, basis)) is None:
                    engine = forward
                    break
                reason = f"no forward mode: {trouble}"
            self._take(rank, engine, reason, warn=name == "forward" == self.choice and engine is self.layerwise)
        return self._engines[rank]

    def _take(self, rank: int, engine: ForwardMode | Layerwise, reason: str, *, warn: bool = False) -> None:
        self._engines[rank] = engine
        log.log(
            logging.WARNING if warn else logging.DEBUG if self.layerwise.quiet else logging.INFO,
            "ELLA: features by %s mode (%s).",
            "layerwise reverse" if engine is self.layerwise else "forward",
            reason,
        )

    def cheaper(self, inputs: Inputs, rank: int) -> str:
        """The engine chosen, or for "auto" the one of less work: a tangent costs about what a cotangent does.

        A cotangent costs more where parameters have no rule, and their rows of J are written and multiplied.
        """
        if self.choice != "auto":
            return self.choice
        return "layerwise" if self.sizes(inputs).num_outputs * self._cotangent_costs(inputs) <= rank else "forward"

    def _cotangent_costs(self, inputs: Inputs) -> float:
        """What a cotangent costs, in tangents: passes back, and rows of J that are held."""
        passes = 1 + self.layerwise.slowness(inputs)
        return passes + self.layerwise.bytes_held(inputs) / max(1, self.sizes(inputs).held)

    def _pulls_back(self, inputs: Inputs, top: int, rank: int) -> bool:
        """Whether the k cotangents of the likeliest outputs cost less than all else; not of several positions."""
        if isinstance(inputs, Picked) or self.choice == "forward":
            return False
        fewer = top + 1 < self.sizes(inputs).num_outputs
        return fewer and top * self._cotangent_costs(inputs) <= rank and len(self.network.output_shape or ()) <= 1

    def _trouble(self, forward: ForwardMode, inputs: Inputs, basis: Basis) -> str | None:
        """Why forward mode cannot be used: a layer without a rule, or one whose rule is wrong under vmap."""
        if written := self.network.view.written & basis.keys():
            return f"evaluating the network writes to {min(written)}"  # and would write to its tangents
        few = rows(inputs, slice(0, 2))
        tangents = {name: part[:2] for name, part in basis.items()}
        try:
            logits, features = forward.features(few, tangents)
        except BROKEN:
            raise
        except Exception as error:
            return _first_line(error)
        v = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(features)
        found = torch.einsum("bc,bck->bk", v, features)
        _, expected = self.layerwise.products(few, lambda _: v.unsqueeze(1), tangents)
        wrong = (found - expected.squeeze(1)).norm() > 0.1 * expected.norm()
        return "its products are not those of reverse mode" if wrong else None

    def _samples_for_features(self, inputs: Inputs, engine: ForwardMode | Layerwise, basis: Basis) -> int:
        sizes = self.sizes(inputs)
        if isinstance(inputs, Picked):
            return num_samples(inputs)  # they come together, whatever is asked of them
        if isinstance(engine, Layerwise):
            outputs = min(sizes.num_outputs, MAX_COTANGENTS)
            folding = self._fold(inputs, basis)[0]
            return self._samples(inputs, outputs, folding=folding, halved=self.precision == "bf16")
        # For each chunk the tangents of all weights are read, and reordered: two samples share that.
        one = 2 * sizes.largest * engine.tangents_per_chunk
        return self._fitting(chunks(self.device).forward, one, least=2, share=2)

    def _samples(
        self,
        inputs: Inputs,
        cotangents: int,
        *,
        folding: Folding = UNFOLDED,
        hold_rows: bool = False,
        halved: bool = False,
    ) -> int:
        """Samples at a time in reverse mode; rows of J that are held, and a copy of them, take memory too."""
        one = 0
        if not isinstance(inputs, Picked):
            sizes = self.sizes(inputs, folding)
            one = (sizes.held + cotangents * sizes.cotangent) // (2 if halved else 1)
        one += cotangents * self.layerwise.bytes_held(inputs)
        if hold_rows:
            one += 2 * sum(parameter.nbytes for parameter in self.network.names)
        return self._fitting(chunks(self.device).reverse, one, share=4 if hold_rows else 2)

    def _fitting(self, work: int, one: int, least: int = 1, share: int = 4) -> int:
        """Samples at a time: `least` even beyond the working set, but within the budget if it has a place for one.

        Of the budget it may be a half, or a quarter where the landmarks' gradients take the rest.
        """
        if self.samples_per_chunk is not None:
            return self.samples_per_chunk
        working_set = min(max(work, least * one), self.memory_budget // share)
        return min(chunks(self.device).samples, max(1, working_set // max(1, one)))

    def _autocast(self, engine: ForwardMode | Layerwise) -> AbstractContextManager:
        """Reverse mode works under autocast; forward mode casts by itself."""
        if self._dtype is None or isinstance(engine, ForwardMode):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)


def _check_devices(model: nn.Module) -> None:
    devices = {value.device for value in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise ValueError(
            f"the network is on several devices ({', '.join(sorted(map(str, devices)))}), but ELLA needs it on one: "
            "move it there with model.to(device), or load it without device_map=."
        )
    if WITHOUT_FLOAT64 & {device.type for device in devices}:
        raise ValueError(
            f"ELLA needs float64, which {devices.pop().type.upper()} does not have: move the network with model.cpu(), "
            "or use ELLACallback, which fits on the CPU after training."
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
