"""Every network of the zoo: right features by both engines, and nothing written to the network itself."""

import contextlib
import copy
import functools
import itertools
import logging
import pickle
import random
import re
import threading
import time
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from zoo import CASES, Case, leaves, pick

from lightning_ella import ELLAPredictor, fit_ella

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*self.trainer. reference is not registered"),  # LightningModule.log
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning"),
    # What torch says to everybody who calls these networks under no_grad.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]

POINTS, UNSEEN, ASKED = 24, 8, 12
ENGINES = ("forward", "layerwise")
SETTINGS = {"num_landmarks": POINTS, "rank": 4, "num_curvature": POINTS, "num_samples": 16, "residual": 2}
SETTINGS |= dict.fromkeys(("prior_variance", "covariance_scale", "residual_scale", "temperature"), 1.0)


# What is right -------------------------------------------------------------------------------------------------------


def targets(case: Case, outputs: Tensor) -> Tensor:
    """Random targets for outputs (B, …), with at most four axes."""
    generator = torch.Generator().manual_seed(4)
    if case.likelihood == "regression":
        return torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
    if case.likelihood == "binary":
        return torch.randint(2, outputs.shape, generator=generator)
    return torch.randint(3, channels_last(outputs).shape[:-1], generator=generator)


def channels_last(values: Tensor) -> Tensor:
    """(B, C, H, W, …) as (B, H, W, C, …): what has one axis more is of an input's outputs."""
    return values.movedim(1, 3) if values.ndim >= 4 and values.shape[1] == 3 else values


def outputs_of(case: Case, model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return case.outputs(model.eval(), inputs).detach()  # some switch gradients on themselves


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def jacobian(case: Case, inputs: Any) -> Tensor:
    """(B, …, P) by plain autograd, for one sample and one output at a time, of a network of its own."""
    model = case.build().eval()
    parameters, found = list(trained(model).values()), []
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), slow_attention():
        for i in range(size(inputs)):
            sample = pick(inputs, slice(i, i + 1))
            shape = case.outputs(model, sample).shape
            for c in range(shape.numel()):
                for parameter in parameters:
                    parameter.grad = None
                case.outputs(model, sample).flatten()[c].backward()
                found.append(torch.cat([dense_gradient(parameter) for parameter in parameters]))
    return torch.stack(found).unflatten(0, (-1, *shape[1:]))


def size(inputs: Any) -> int:
    return next(len(leaf) for leaf in leaves(inputs) if leaf.ndim)


def dense_gradient(parameter: Tensor) -> Tensor:
    """(p,) in float64: zeros where the outputs do not depend on it."""
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=torch.float64)
    return (parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad).flatten().double()


@contextmanager
def slow_attention() -> Iterator[None]:
    """As in training: the fast path of a TransformerEncoder has no derivatives."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", ["Net", "ConvNet", "SequenceFirst", "LogitScale", "segmentation", "Recurrent"])
def test_the_oracle_agrees_with_function_transforms(name: str):
    case = CASES[name]
    model, inputs = case.build().eval(), case.inputs(ASKED, 3)
    parameters = {name: parameter.detach() for name, parameter in trained(model).items()}
    blocks = jacrev(lambda values: functional_call(model, values, (inputs,)))(parameters)
    dims = next(iter(blocks.values())).ndim - next(iter(parameters.values())).ndim
    blocks = [block.reshape(*block.shape[:dims], -1) for block in blocks.values()]
    torch.testing.assert_close(jacobian(case, inputs), torch.cat(blocks, -1))


# What may not change -------------------------------------------------------------------------------------------------


def parts(thing: Any) -> dict[str, Any]:
    """What belongs to a module, container, function or object of the zoo."""
    if isinstance(thing, nn.Module):
        found = {f".{name}": value for name, value in vars(thing).items()}
        found |= {f".{name}": value for name, value in thing.named_parameters(recurse=False, remove_duplicate=False)}
        found |= {f".{name}": value for name, value in thing.named_buffers(recurse=False, remove_duplicate=False)}
        slots = [slot for kind in type(thing).__mro__ for slot in vars(kind).get("__slots__", ())]
        return found | {f".{slot}": getattr(thing, slot) for slot in slots if hasattr(thing, slot)}
    if isinstance(thing, dict | OrderedDict | types.MappingProxyType):
        return {f"[{key!r}]": value for key, value in thing.items()}
    if isinstance(thing, list | tuple | deque):
        return {f"[{i}]": value for i, value in enumerate(thing)}
    if isinstance(thing, set | frozenset):
        return {f"{{{id(value)}}}": value for value in thing}
    if isinstance(thing, functools.partial):
        return {".func": thing.func, ".args": thing.args, ".keywords": thing.keywords}
    if isinstance(thing, types.MethodType):
        return {".__self__": thing.__self__}
    if isinstance(thing, types.FunctionType):
        cells = thing.__closure__ or ()
        held = [cell.cell_contents for cell in cells if cell.cell_contents is not None]
        return {f".closure[{i}]": value for i, value in enumerate(held)}
    return {f".{name}": value for name, value in getattr(thing, "__dict__", {}).items()} if own(thing) else {}


def own(thing: Any) -> bool:
    return type(thing).__module__ in ("zoo", "torch.utils.hooks") and not isinstance(thing, type)


def seen_from(root: Any) -> dict[str, Any]:
    """Everything that hangs on a network, by path; each thing once."""
    found, known, waiting = {"": root}, {id(root)}, [("", root)]
    while waiting:
        path, thing = waiting.pop()
        for name, value in parts(thing).items():
            found[path + name] = value
            if id(value) not in known:
                known.add(id(value))
                waiting.append((path + name, value))
    return found


def described(value: Any) -> Any:
    """What of something must stay, apart from its identity, and a tensor's bytes."""
    if isinstance(value, np.ndarray | bytearray):
        return bytes(value)
    if isinstance(value, torch.Generator):
        return bits(value.get_state())
    if isinstance(value, random.Random | itertools.count):
        return value.getstate() if isinstance(value, random.Random) else repr(value)
    if not isinstance(value, Tensor):
        return type(value)
    return type(value), value.dtype, value.shape, value.device, value.requires_grad, value.is_leaf, id(value.grad_fn)


class Witness:
    """Knows how a network and its random states were, and says what is different."""

    def __init__(self, model: nn.Module):
        self.model, self.before = model, seen_from(model)
        self.kinds = {path: described(value) for path, value in self.before.items()}
        self.tensors = {path: value for path, value in self.before.items() if isinstance(value, Tensor)}
        self.gradients = {path: value.grad for path, value in self.tensors.items() if value.is_leaf}
        self.bytes = {path: bits(value) for path, value in self.tensors.items()}
        self.random = random_states()

    def differences(self) -> list[str]:
        now, before = seen_from(self.model), self.before
        found = [f"{path} is new" for path in now.keys() - before.keys()]
        found += [f"{path} is gone" for path in before.keys() - now.keys()]
        for path in now.keys() & before.keys():
            value = now[path]
            if value is not before[path]:
                found.append(f"{path} is another {type(value).__name__}")
            elif described(value) != self.kinds[path]:
                found.append(f"{path} is not as it was")
            elif path in self.bytes and bits(value) != self.bytes[path]:
                found.append(f"{path} has other values")
            elif path in self.gradients and value.grad is not self.gradients[path]:
                found.append(f"{path} has another gradient")
        return found

    def random_differences(self) -> list[str]:
        now = random_states()
        return [f"{name}'s random state" for name, state in self.random.items() if state != now[name]]


def bits(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    with torch.no_grad():
        return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the one that others use
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": (name, keys.tobytes(), *rest),
    }


@contextmanager
def watched(look: Callable[[], list[str]]) -> Iterator[set[str]]:
    """Look again and again from another thread, a tenth of the time; yields what was found."""
    found: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        pause = 0.004
        while not done.wait(pause):
            started = time.perf_counter()
            try:
                found.update(look())
            except RuntimeError as error:  # a dictionary changed its size while it was read
                found.add(str(error))
            pause = max(0.004, 9 * (time.perf_counter() - started))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


# One fit for each network and engine ---------------------------------------------------------------------------------


def loader(case: Case, inputs: Any, count: int, batch_size: int = 14) -> DataLoader:
    known = targets(case, outputs_of(case, case.build(), inputs))
    return DataLoader(range(count), batch_size, collate_fn=lambda some: (pick(inputs, some), known[some]))


def by_length(inputs: Any) -> Tensor:
    """Numbers of the samples, the longest first."""
    leaf = next(leaf for leaf in leaves(inputs) if leaf.ndim > 1).double().flatten(1)
    return (leaf.count_nonzero(1) + leaf.sum(1).sigmoid()).argsort(descending=True)


@functools.cache
def training_inputs(name: str) -> Any:
    inputs = CASES[name].inputs(POINTS, 1)
    return pick(inputs, by_length(inputs))


@functools.cache
def asked_inputs(name: str) -> Any:
    return CASES[name].inputs(ASKED, 3)


@functools.cache
def jacobians(name: str) -> tuple[Tensor, Tensor]:
    """Of the training points and of those that a predictor is asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jacobian(CASES[name], training_inputs(name)), jacobian(CASES[name], asked_inputs(name))


def batches(name: str) -> list[Tensor]:
    """Numbers of samples that are asked for together: sorted in both directions, shuffled, and alone."""
    order, shuffled = by_length(asked_inputs(name)), torch.randperm(ASKED, generator=torch.Generator().manual_seed(0))
    return [order[:7], order.flip(0), shuffled[:3], shuffled[3:6], shuffled, order[-1:]]


def fit(case: Case, model: nn.Module, inputs: Any, engine: str, **more: Any) -> ELLAPredictor:
    train, unseen = loader(case, inputs, POINTS), loader(case, case.inputs(UNSEEN, 2), UNSEEN)
    more = {"forward": case.forward} | more if case.forward else more
    return fit_ella(model, train, unseen, case.likelihood, engine=engine, **SETTINGS, **more)


@dataclass
class Visit:
    """What happened to a network while it was fitted and asked."""

    model: nn.Module
    could: list[bool]  # whether it could be copied and pickled, before
    graphs: list[str]  # where tensors with a graph were on it, before
    predictor: ELLAPredictor | None = None
    error: Exception | None = None
    answers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # outputs and features of each batch
    during: set[str] = field(default_factory=set)
    after: list[str] = field(default_factory=list)

    def served(self) -> ELLAPredictor:
        if self.error is not None:
            raise self.error
        assert self.predictor is not None
        return self.predictor


@functools.cache
def visit(name: str, engine: str) -> Visit:
    case, model = CASES[name], CASES[name].build()
    training, asked = training_inputs(name), [pick(asked_inputs(name), numbers) for numbers in batches(name)]
    found, witness = Visit(model, [works(copied, model) for copied in COPIES], graphs(model)), Witness(model)
    with watched(witness.differences) as found.during:
        try:
            found.predictor = fit(case, model, training, engine)
        except Exception as error:
            found.error = error
    drawn = witness.random_differences()
    with watched(lambda: [*witness.differences(), *witness.random_differences()]) as during:
        for some in asked if found.predictor else ():
            try:
                found.answers.append(found.served().features(some))
            except Exception as error:
                found.error = found.error or error
    found.during |= during
    found.after = witness.differences() + drawn + witness.random_differences()
    return found


COPIES = (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)))


def works(function: Callable[[nn.Module], Any], model: nn.Module) -> bool:
    try:
        function(model)
    except Exception:
        return False
    return True


def graphs(model: nn.Module) -> list[str]:
    return [path for path, value in seen_from(model).items() if isinstance(value, Tensor) and value.grad_fn]


def difference(found: Tensor, expected: Tensor) -> float:
    """Of the worst sample, relative to the size of all."""
    assert found.shape == expected.shape
    return float((found.double() - expected).flatten(1).norm(dim=1).max() / expected.flatten(1).norm(dim=1).mean())


def span(predictor: ELLAPredictor, model: nn.Module) -> Tensor:
    """V, (P, K), in the order of the network's parameters."""
    basis = predictor.basis
    assert basis.keys() == trained(model).keys()
    return torch.cat([basis[name].reshape(predictor.rank, -1) for name in trained(model)], 1).T.double()


all_cases = pytest.mark.parametrize("name", CASES)
both_engines = pytest.mark.parametrize("engine", ENGINES)


@all_cases
@both_engines
def test_features_are_those_of_each_sample_alone(name: str, engine: str):
    found, case = visit(name, engine), CASES[name]
    predictor = found.served()
    expected = channels_last(jacobians(name)[1]) @ span(predictor, found.model)
    for numbers, (_, features) in zip(batches(name), found.answers, strict=True):
        features = features[..., : predictor.rank].reshape(expected[numbers].shape)
        assert difference(features, expected[numbers]) < case.tolerance


@all_cases
@both_engines
def test_the_mean_is_what_the_network_says(name: str, engine: str):
    found, case, model = visit(name, engine), CASES[name], CASES[name].build()
    found.served()
    for numbers, (mean, features) in zip(batches(name), found.answers, strict=True):
        assert not mean.requires_grad
        assert not features.requires_grad
        expected = channels_last(outputs_of(case, model, pick(asked_inputs(name), numbers)))
        assert difference(mean.reshape(expected.shape), expected.double()) < case.tolerance


@all_cases
@both_engines
def test_the_basis_is_made_of_true_gradients(name: str, engine: str):
    found, J = visit(name, engine), jacobians(name)[0]
    V, rows = span(found.served(), found.model), J.flatten(0, -2)
    within = torch.linalg.svd(rows, full_matrices=False)
    directions = within.Vh[within.S / within.S[0] > 1e-10]
    tolerance = max(1e-6, CASES[name].tolerance)
    torch.testing.assert_close(V.T @ V, torch.eye(V.shape[1], dtype=V.dtype), rtol=0, atol=10 * tolerance)
    assert (V - directions.T @ (directions @ V)).norm() < tolerance * V.norm()


@all_cases
@both_engines
def test_the_curvature_is_that_of_all_training_points(name: str, engine: str):
    case, found, J = CASES[name], visit(name, engine), jacobians(name)[0]
    if case.likelihood == "regression":
        pytest.skip("depends on the noise")
    features = channels_last(J) @ span(found.served(), found.model)
    outputs = channels_last(outputs_of(case, case.build(), training_inputs(name))).double()
    if case.likelihood == "binary":
        hessian = (outputs.sigmoid() * (1 - outputs.sigmoid())).unsqueeze(-1).unsqueeze(-1)
        features = features.unsqueeze(-2) if features.ndim == 2 else features
        hessian = hessian.reshape(*features.shape[:-1], 1)
    else:
        p = outputs.softmax(-1)
        hessian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    expected = torch.einsum("...ck,...cd,...dl->kl", features, hessian, features)
    assert (found.served().curvature - expected).norm() < 10 * max(case.tolerance, 1e-8) * expected.norm()


SORTED = (
    "SortedByFirst",
    "SortedByAMatrix",
    "SortedAlongTheSecondAxis",
    "SortedByAnEmbedding",
    "SortedByAFunctionOfItsOwn",
    "SortedAsColumns",
)


@pytest.mark.parametrize("name", SORTED)
def test_a_batch_in_which_nothing_moves_proves_nothing_for_the_next(name: str):
    case = CASES[name]
    inputs = case.inputs(ASKED, 3)
    inputs = inputs[inputs[:, 0].argsort()]
    predictor = fit(case, case.build(), training_inputs(name), "layerwise")
    shuffled = torch.randperm(ASKED, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([predictor.features(one.unsqueeze(0))[1] for one in inputs])
    assert difference(predictor.features(inputs)[1], expected.double()) < case.tolerance
    assert difference(predictor.features(inputs[shuffled])[1], expected[shuffled].double()) < case.tolerance


def test_a_layer_that_is_called_proves_nothing_where_it_is_not():
    case = CASES["LayerOrItsFunction"]
    inputs = case.inputs(ASKED, 3).abs()
    predictor = fit(case, case.build(), case.inputs(POINTS, 1).abs(), "layerwise")
    for some in (inputs, -inputs):
        expected = torch.cat([predictor.features(one.unsqueeze(0))[1] for one in some])
        assert difference(predictor.features(some)[1], expected.double()) < case.tolerance
    slow = jacobian(case, -inputs) @ span(predictor, case.build())
    assert difference(predictor.features(-inputs)[1][..., : predictor.rank], slow) < case.tolerance


# Never written -------------------------------------------------------------------------------------------------------


@all_cases
@both_engines
def test_nothing_is_ever_written_to_the_network(name: str, engine: str):
    found = visit(name, engine)
    assert not found.after
    assert not found.during


LOOKS: dict[str, Any] = {}  # of a function that is given to ELLA: what is in its closure is followed
ELSEWHERE = ThreadPoolExecutor(1)  # where ELLA does not watch who uses the network's tensors


def fails_midway(view: nn.Module, inputs: Any) -> Any:
    LOOKS["calls"] += 1
    outputs = (LOOKS["case"].forward or zoo.call)(view, inputs)
    LOOKS["seen"] += ELSEWHERE.submit(LOOKS["witness"].differences).result()
    if LOOKS["calls"] == 5:
        raise RuntimeError("in the middle")
    return outputs


@all_cases
def test_nothing_is_written_when_the_network_fails_midway(name: str):
    case, model = CASES[name], CASES[name].build()
    witness = Witness(model)
    LOOKS.update(case=case, witness=witness, seen=[], calls=0)
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(case, model, training_inputs(name), "layerwise", forward=fails_midway)
    assert not LOOKS["seen"]
    assert not witness.differences() + witness.random_differences()


@all_cases
@both_engines
def test_the_network_can_be_copied_and_pickled_as_before(name: str, engine: str):
    found, case = visit(name, engine), CASES[name]
    assert graphs(found.model) == found.graphs
    for copied, could in zip(COPIES, found.could, strict=True):
        if could:
            twin, fresh = copied(found.model), copied(case.build())
            torch.testing.assert_close(dict(twin.named_parameters()), dict(fresh.named_parameters()), rtol=0, atol=0)
            torch.testing.assert_close(dict(twin.named_buffers()), dict(fresh.named_buffers()), rtol=0, atol=0)
            with contextlib.suppress(AttributeError, LookupError):  # slots, and what closures know, are not copied
                expected = outputs_of(case, fresh, asked_inputs(name))
                torch.testing.assert_close(outputs_of(case, twin, asked_inputs(name)), expected, rtol=0, atol=0)


EXPORTED = ("ConvNet", "ModuleWithTwoNames", "Parametrized", "HookOnNorm")


@pytest.mark.parametrize("name", EXPORTED)
def test_the_network_can_be_exported_and_compiled_as_before(name: str):
    case, model, inputs = CASES[name], visit(name, "layerwise").model, asked_inputs(name)
    expected = outputs_of(case, case.build(), inputs)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            exported = torch.export.export(model, (inputs,)).module()
            torch.testing.assert_close(exported(inputs), expected)
            torch.testing.assert_close(torch.compile(model, backend="eager")(inputs), expected)
    finally:
        for module, mode in modes.items():
            module.training = mode


# Threads -------------------------------------------------------------------------------------------------------------

SHARED = ("ConvNet", "PackedLSTM", "CheckpointOfTwoNorms", "ModuleWithTwoNames", "HookKeepsActivations", "Mixture")


def ask(predictor: ELLAPredictor, inputs: Any) -> tuple[Tensor, Tensor]:
    answer = predictor(inputs)
    return answer.logits_mean, answer.logits_variance


def _answer(predictor: ELLAPredictor, inputs: Any) -> tuple[Tensor, Tensor] | Exception:
    try:
        return ask(predictor, inputs)
    except Exception as error:
        return error


def shared_predictor(name: str, engine: str) -> tuple[nn.Module, ELLAPredictor, list[Any]]:
    """With weights that survive a trip through float32."""
    case = CASES[name]
    model = case.build().float().double().eval()
    predictor = fit(case, model, training_inputs(name), engine)
    return model, predictor, [pick(asked_inputs(name), slice(i, i + 4)) for i in range(0, ASKED, 2)]


@pytest.mark.parametrize("name", SHARED)
@both_engines
def test_many_threads_get_what_one_gets(name: str, engine: str):
    model, predictor, inputs = shared_predictor(name, engine)
    expected = [ask(predictor, some) for some in inputs]
    witness = Witness(model)
    with watched(witness.differences) as during, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda some: ask(predictor, some), inputs * 4))
    for answer, right in zip(found, expected * 4, strict=True):
        torch.testing.assert_close(answer, right, rtol=0, atol=0)
    assert not during
    assert not witness.differences()


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("kind", ["called", "moved", "cast"])
def test_answers_are_right_while_the_network_is_used(name: str, kind: str):
    model, predictor, inputs = shared_predictor(name, "layerwise")
    expected, done = [ask(predictor, some) for some in inputs], threading.Event()

    def use() -> int:
        """How often."""
        count = 0
        while not done.is_set():
            if kind == "cast":
                model.float().double()
            elif kind == "moved":
                model._apply(torch.clone)
            else:
                model(inputs[0])
            count += 1
        return count

    refused: list[Exception] = []
    with ThreadPoolExecutor(9) as pool:
        used = pool.submit(use)
        try:
            answers = list(pool.map(lambda some: _answer(predictor, some), inputs * 4))
        finally:
            done.set()
        assert used.result() > 0
    # In float32, if it was cast just then.
    tolerance = 1e-4 if kind == "cast" else 1e-12
    for answer, right in zip(answers, expected * 4, strict=True):
        if isinstance(answer, Exception):
            refused.append(answer)
        else:
            assert all(difference(a, b) < tolerance for a, b in zip(answer, right, strict=True))
    assert kind == "cast" or not refused, refused
    assert all(isinstance(error, ValueError) for error in refused), refused
    said = {re.sub(r"\b[0-9a-f]{8}\b", "", str(error)) for error in refused}
    assert len(said) <= 1, said
    assert all("type" in line or "float32" in line for line in said), said
    torch.testing.assert_close([ask(predictor, some) for some in inputs], expected)


# Refused, or said ----------------------------------------------------------------------------------------------------


class Keeps(zoo.Net):
    """Dropout that stays on, in one way or another."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.dropout, self.slope = kind, nn.Dropout(0.5), nn.RReLU()

    def forward(self, x):
        z = self.f(x).tanh()
        if self.kind == "function":
            z = nn.functional.dropout(z, 0.5, True)
        elif self.kind == "module":
            z = self.dropout.train()(z)
        elif self.kind == "slope":
            z = self.slope.train()(z)
        elif self.kind == "gumbel":
            z = nn.functional.gumbel_softmax(z)
        else:
            z = z + torch.randn_like(z)
        return self.h(self.g(z).tanh())


class Mixes(zoo.Net):
    """Outputs of a sample depend on its batch, in one way or another."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.norm = kind, nn.BatchNorm1d(6, track_running_stats=kind != "statistics")

    def forward(self, x):
        z = self.f(x)
        if self.kind == "mean":
            z = z - z.mean(0)
        elif self.kind == "softmax":
            z = z.softmax(0)
        elif self.kind == "branch":
            z = z if x.mean() > 0 else self.g(z)
        elif self.kind == "attention":
            z = (z @ z.T).softmax(1) @ z
        elif self.kind == "training":
            z = nn.functional.batch_norm(z, None, None, training=True)
        elif self.kind == "neighbour":
            z = z + z.roll(1, 0).sin()
        else:
            z = self.norm.train()(z) if self.kind == "mode" else self.norm(z)
        return self.h(self.g(z).tanh())


class Ends(nn.Module):
    def __init__(self, width: int, last: nn.Module):
        super().__init__()
        self.net, self.last = nn.Linear(4, width), last

    def forward(self, x):
        return self.last(3 * self.net(x))


def told(
    model: nn.Module, caplog: pytest.LogCaptureFixture, likelihood: str = "classification", engine: str = "auto"
) -> str:
    """What a user hears, as an error or a warning."""
    case = Case("", lambda: model, zoo.vectors, likelihood=likelihood)
    caplog.set_level(logging.WARNING, "lightning_ella")
    try:
        fit(case, case.build(), case.inputs(POINTS, 1), engine)
    except ValueError as error:
        return str(error)
    lines = [record.getMessage() for record in caplog.records]
    usual = ("calibration points", "ask for no uncertainty")
    return "\n".join(line for line in lines if not any(words in line for words in usual))


@both_engines
@pytest.mark.parametrize("kind", ["function", "module", "slope", "gumbel", "noise"])
def test_a_network_that_draws_at_random_is_named(kind: str, engine: str, caplog: pytest.LogCaptureFixture):
    said = told(Keeps(kind), caplog, engine=engine)
    assert re.search("dropout|random|twice", said, re.IGNORECASE)
    if kind in ("module", "slope"):
        assert {"module": "dropout", "slope": "slope"}[kind] in said  # the layer's own name


@both_engines
@pytest.mark.parametrize(
    "kind", ["mean", "softmax", "branch", "attention", "training", "neighbour", "mode", "statistics"]
)
def test_a_network_whose_samples_see_each_other_is_named(kind: str, engine: str, caplog: pytest.LogCaptureFixture):
    said = told(Mixes(kind), caplog, engine=engine)
    assert re.search("batch|alone", said)
    if kind in ("mode", "statistics"):
        assert "norm" in said


@pytest.mark.parametrize("width", [3, 1])
def test_outputs_that_are_probabilities_are_refused_with_what_to_pass(width: int, caplog: pytest.LogCaptureFixture):
    last, likelihood = (nn.Softmax(-1), "classification") if width == 3 else (nn.Sigmoid(), "binary")
    said = told(Ends(width, last), caplog, likelihood)
    assert "probabilities" in said
    assert "forward=" in said
    assert ("log" in said) if width == 3 else ("logit" in said)


class Nudged(nn.Module):
    """A sigmoid, away from 0 and 1."""

    def __init__(self, nudge: Callable[[Tensor], Tensor]):
        super().__init__()
        self.nudge = nudge

    def forward(self, x):
        return self.nudge(x.sigmoid())


@pytest.mark.parametrize(
    "nudge",
    [
        lambda p: p.clamp(1e-6, 1 - 1e-6),
        lambda p: p.nan_to_num() * 1.0,
        lambda p: 0.999 * p.clamp_min(1e-6).flatten() + 1e-4,
        lambda p: torch.maximum(p, torch.tensor(1e-7, dtype=p.dtype)).to(p.dtype),
    ],
)
def test_probabilities_that_are_kept_from_0_and_1_are_refused(
    nudge: Callable[[Tensor], Tensor], caplog: pytest.LogCaptureFixture
):
    assert "probabilities" in told(Ends(1, Nudged(nudge)), caplog, "binary")


@pytest.mark.parametrize("last", [nn.LogSoftmax(-1), nn.ReLU(), nn.Identity(), nn.Softplus()])
def test_outputs_that_may_be_logits_are_not_refused(last: nn.Module, caplog: pytest.LogCaptureFixture):
    assert not told(Ends(3, last), caplog)


def test_regression_in_the_unit_interval_is_not_refused(caplog: pytest.LogCaptureFixture):
    assert not told(Ends(1, nn.Sigmoid()), caplog, "regression")
