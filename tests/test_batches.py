"""What is taken for inputs and targets, how samples are told apart, and how a network is called."""

import logging
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves, tree_structure

from lightning_ella.batches import (
    Picked,
    call,
    describe,
    has_rows,
    inputs_and_targets,
    is_rowwise,
    num_samples,
    plain,
    rows,
    telling,
    tensors,
)

X, Y, MASK = torch.randn(4, 3), torch.arange(4), torch.ones(4, 3)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Tokens(NamedTuple):
    tokens: Tensor
    lengths: Tensor
    Label: Tensor


@dataclass(slots=True)
class Scan:
    image: Tensor
    mask: Tensor
    name: str | None = None


class Encoding(UserDict):
    """As the BatchEncoding of a tokenizer."""

    def to(self, device: Any) -> "Encoding":
        raise AssertionError("it would change the user's own")


class Graphs:
    """As a batch of torch-geometric: parts are kept in a store, and `to` replaces them in place."""

    def __init__(self, **parts: Any):
        self._store = parts

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_store"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __copy__(self) -> "Graphs":
        return Graphs(**self._store)

    def size(self) -> int:
        return 1

    def to_dict(self) -> dict[str, Any]:
        return dict(self._store)

    def to(self, device: Any, **_: Any) -> "Graphs":
        self._store = {
            name: part.to(device) if isinstance(part, Tensor) else part for name, part in self._store.items()
        }
        return self


@dataclass(slots=True)
class Molecules:
    """As chemprop's BatchMolGraph: a dataclass whose `to` returns nothing."""

    V: Tensor
    batch: Tensor
    moved: list = field(default_factory=list)

    def to(self, device: Any) -> None:
        self.V, self.batch, self.moved = self.V.to(device), self.batch.to(device), [*self.moved, device]


class Training(NamedTuple):
    """As chemprop's TrainingBatch."""

    bmg: Molecules
    V_d: Tensor | None
    X_d: Tensor | None
    Y: Tensor
    w: Tensor


class Meta(Tensor):
    """As MONAI's MetaTensor: a tensor that keeps its kind through operations."""


def graphs() -> Graphs:
    return Graphs(
        x=torch.randn(5, 2),
        edge_index=torch.zeros(2, 3, dtype=torch.long),
        batch=torch.tensor([0, 0, 1, 1, 1]),
        y=Y[:2],
    )


def molecules() -> Training:
    return Training(
        Molecules(torch.randn(5, 2), torch.tensor([0, 0, 1, 1, 1])), None, None, torch.randn(2, 1), MASK[:2]
    )


@pytest.mark.parametrize(
    ("batch", "inputs", "targets"),
    [
        ((X, Y), X, Y),
        ([X, Y], X, Y),
        ((X, Y, ["a.png"] * 4), X, Y),
        ([X, Y, torch.arange(4), "more"], X, Y),
        (({"a": X, "b": MASK}, Y), {"a": X, "b": MASK}, Y),
        ({"image": X, "label": Y}, X, Y),
        ({"Image": X, "LABELS": Y}, X, Y),
        ({"image": X, "mask": MASK, "crs": ["EPSG:4326"] * 4}, X, MASK),
        ({"signal": X, "target": Y}, X, Y),
        ({"x": X, "y": Y, "label": ["cat"] * 4}, X, Y),
        ({"input_ids": X, "attention_mask": MASK, "labels": Y}, {"input_ids": X, "attention_mask": MASK}, Y),
        ({"x": X, "attention_mask": MASK, "labels": Y}, {"x": X, "attention_mask": MASK}, Y),
        ({"left": X, "right": MASK, "targets": Y}, {"left": X, "right": MASK}, Y),
        (Encoding(pixel_values=X, labels=Y), X, Y),
        (OrderedDict(img=X, target=Y), X, Y),
        (Pair(X, Y), X, Y),
        (Scan(X, MASK), X, MASK),
        (SimpleNamespace(x=X, y=Y), X, Y),
    ],
)
def test_parts_with_the_usual_names_are_found(batch: Any, inputs: Any, targets: Tensor):
    found = inputs_and_targets(batch)
    assert type(found[0]) is type(inputs)
    expected, got = tree_leaves(inputs), tree_leaves(found[0])
    assert all(a is b for a, b in zip(expected, got, strict=True))
    assert found[1] is targets


@pytest.mark.parametrize("batch", [Tokens(X, Y, Y), graphs(), molecules()])
def test_an_object_of_several_parts_stays_whole(batch: Any):
    inputs, targets = inputs_and_targets(batch)
    assert inputs is batch
    assert targets is (
        batch.Label if isinstance(batch, Tokens) else batch.Y if isinstance(batch, Training) else batch.y
    )


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, r"a tensor \(4, 3\): pass unpack=lambda batch: \(inputs, targets\), or"),
        ((X, (Y, MASK)), r"a tuple \(tensor \(4, 3\), tuple of 2\): .*\(batch\[0\], batch\[1\]\[0\]\)\."),
        (({"a": X}, (Y, None)), r"a tuple \(dict of 1, tuple of 2\): .*\(batch\[0\], batch\[1\]\[0\]\)\."),
        ((X, {"labels": Y}), r"a tuple .*\(batch\[0\], batch\[1\]\['labels'\]\)\."),
        ((X, "name", Y), r"\(batch\[0\], batch\[2\]\)\."),
        ({"image": X, "age": Y}, r"a dict with 'image', 'age': .*\(batch\['image'\], batch\['age'\]\)\."),
        ({"image": X, "mask": MASK, "label": Y}, r"\(batch\['image'\], batch\['mask'\]\), or batch\['label'\]\."),
        (SimpleNamespace(signal=X, age=Y), r"with 'signal', 'age': .*\(batch.signal, batch.age\)\."),
        (Graphs(x=X, y=Y, train_mask=Y > 1), r"\(batch, batch.y, batch.train_mask\)\."),
        ({"x": X, "y": Y, "val_mask": Y > 1}, r"\(batch, batch\['y'\], batch\['val_mask'\]\)\."),
        (Graphs(x=X, y=Y, batch_size=2), r"\(batch, batch.y, torch.arange\(len\(batch.y\)\) < batch.batch_size\)\."),
        (["a"] * 9, r"a list of 9 \(str, str, str, str, str, str, …\): pass unpack=lambda batch: \(inputs, targets\)"),
    ],
)
def test_other_batches_are_told_which_unpack(batch: Any, message: str):
    with pytest.raises(TypeError, match=message):
        inputs_and_targets(batch)


@pytest.mark.parametrize(
    ("batch", "line"),
    [
        ((X, Y), None),
        (
            (X, Y, "a"),
            "ELLA: of a tuple (tensor (4, 3), tensor (4,), str) the first two are taken for inputs and targets",
        ),
        ({"image": X, "label": Y}, "ELLA: 'image' is taken for the inputs and 'label' for the targets."),
        (
            {"image": X, "label": Y, "crs": 1},
            "'image' is taken for the inputs and 'label' for the targets; 'crs' not used.",
        ),
        ({"a": X, "b": X, "y": Y}, "ELLA: 'a', 'b' are taken for the inputs and 'y' for the targets."),
        (
            graphs(),
            "ELLA: a Graphs with 'x', 'edge_index', 'batch', 'y' is taken for the inputs and 'y' for the targets.",
        ),
    ],
)
def test_what_was_taken_for_what_is_said_when_it_is_asked_for(batch: Any, line: str | None, caplog: Any):
    caplog.set_level(logging.INFO, "lightning_ella")
    inputs_and_targets(batch)
    assert not caplog.messages
    with telling():
        inputs_and_targets(batch)
    assert len(caplog.messages) == (line is not None)
    assert line is None or line in caplog.messages[0]


def test_constants_are_never_sliced():
    inputs = {"scale": torch.tensor(2.0), "x": X, "size": [8, 8]}
    assert num_samples(inputs) == 4
    part = rows(inputs, slice(1, 3))
    assert part["scale"].item() == 2
    assert part["x"].equal(X[1:3])
    assert part["size"] == [8, 8]


def test_samples_of_picked_inputs_are_rows_of_the_output():
    whole = graphs()
    picked = Picked(whole, torch.tensor([0, 2, 3]))
    assert num_samples(picked) == 3
    part = rows(picked, slice(1, 3))
    assert part.whole is whole
    assert part.rows.tolist() == [2, 3]


@pytest.mark.parametrize(
    "layout", ["to_sparse", pytest.param("to_sparse_csr", marks=pytest.mark.filterwarnings("ignore"))]
)
def test_sparse_inputs_are_refused_with_the_fix(layout: str):
    for ask in (num_samples, lambda inputs: rows(inputs, slice(0, 2))):
        with pytest.raises(TypeError, match=r"to_dense\(\)"):
            ask({"x": getattr(X, layout)()})


def test_inputs_without_a_tensor_have_no_samples():
    with pytest.raises(TypeError, match="a dict with 'scale': pass unpack="):
        num_samples({"scale": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (X, True),
        ({"x": X, "scale": torch.tensor(1.0), "name": "a", "nothing": None}, True),
        ((X, None, Y, None), True),
        ({"x": X, "sizes": [8, 8]}, True),
        (Scan(X, MASK), True),
        ({"x": X, "adjacency": torch.zeros(7, 7)}, False),
        ({"x": X, "words": ["a"] * 4}, False),
        ({"x": X, "nested": {"lengths": [1, 2, 3, 4]}}, False),
        ({"scale": torch.tensor(1.0)}, False),
        (X.T, False),
        ([X, X[:2]], False),
        (pack_sequence([torch.randn(2, 1)] * 4), False),
        ({"x": X, "graph": graphs()}, False),
        (molecules(), False),
    ],
)
def test_rows_are_samples_where_every_tensor_has_as_many(inputs: Any, expected: bool):
    assert is_rowwise(inputs, 4) is expected


def test_lists_may_be_constants_where_that_is_known():
    assert has_rows({"x": X, "sizes": [8, 8, 8, 8]}, 4)


def test_subclasses_of_tensors_become_plain():
    batch = {"image": X.as_subclass(Meta), "deep": (Y.as_subclass(Meta), "name"), "weight": nn.Parameter(X)}
    moved = plain(batch, "cpu")
    assert [type(leaf) for leaf in tree_leaves(moved)] == [Tensor, Tensor, str, Tensor]
    assert type(batch["image"]) is Meta


@pytest.mark.parametrize("make", [graphs, molecules, lambda: {"graph": graphs(), "rest": X}])
def test_objects_move_as_copies(make: Callable[[], Any]):
    batch = make()
    before = list(tensors(batch))
    moved = plain(Picked(batch, torch.arange(2)), "meta")
    assert len(list(tensors(moved))) == len(before) + 1
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert all(a is b for a, b in zip(before, tensors(batch), strict=True))
    assert {tensor.device.type for tensor in before} == {"cpu"}


def test_packed_sequences_keep_their_lengths_where_they_belong():
    moved = plain(pack_sequence([torch.randn(2, 1), torch.randn(1, 1)]), "meta")
    assert isinstance(moved, PackedSequence)
    assert moved.data.device.type == "meta"
    assert moved.batch_sizes.device.type == "cpu"


def network(forward: Callable) -> nn.Module:
    return type("Network", (nn.Module,), {"forward": forward})()


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


PAIR = {"a": X, "b": MASK}


@pytest.mark.parametrize(
    ("forward", "inputs", "expected"),
    [
        (lambda self, x: x, X, X),
        (lambda self, x: x, (X, Y), (X, Y)),
        (lambda self, x, lengths: (x, lengths), (X, Y), (X, Y)),
        (lambda self, x, *, scale=1: x, [X, Y], [X, Y]),
        (lambda self, inputs: inputs["a"], PAIR, X),
        (lambda self, a, b: (a, b), PAIR, (X, MASK)),
        (lambda self, b, a=None, c=None: (a, b, c), PAIR, (X, MASK, None)),
        (lambda self, a=None: a, PAIR, X),
        (lambda self, *, b, a: (a, b), PAIR, (X, MASK)),
        (lambda self, **inputs: inputs, PAIR, PAIR),
        (lambda self, a, **rest: (a, rest), PAIR, (X, {"b": MASK})),
        (lambda self, *args, **kwargs: (args, kwargs), PAIR, ((PAIR,), {})),
        (lambda self, a, /: a, PAIR, PAIR),
        (lambda self, inputs=None: inputs, PAIR, PAIR),
        (lambda self, inputs: inputs, PAIR, PAIR),
        (lambda self, tokens, lengths: (tokens, lengths), Tokens(X, Y, Y), (X, Y)),
        (lambda self, x, scale=2: (x, scale), SimpleNamespace(x=X, scale=None), (X, 2)),
        (lambda self, tokens, Label=None, y=None: (tokens, Label), Tokens(X, Y, Y), (X, None)),
    ],
)
def test_a_network_gets_what_its_forward_takes(forward: Callable, inputs: Any, expected: Any):
    for model in (network(forward), Wrapper(network(forward))):
        found = call(model, inputs)
        assert tree_structure(found) == tree_structure(expected)
        assert all(a is b for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True))


def test_an_annotation_says_that_a_network_takes_a_dict():
    class Takes(nn.Module):
        def forward(self, a: dict[str, Tensor]) -> Tensor:
            return a["b"]

    assert call(Takes(), PAIR) is MASK


@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_go_in_whole_or_part_by_part(compiled: bool):
    class Whole(nn.Module):
        def forward(self, data: Graphs) -> Tensor:
            return data.x

    class Named(Whole):
        def forward(self, batch: Graphs) -> Tensor:
            return batch.x

    class Parts(nn.Module):
        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_weight: Any = None, size: Any = None):
            assert edge_index is data.edge_index
            assert batch is data.batch
            assert edge_weight is None
            assert size is None
            return x

    data = graphs()
    for kind in (Whole, Named, Parts):
        model = torch.compile(kind(), backend="eager", disable=True) if compiled else kind()
        assert call(model, data) is data.x
        assert call(model, Picked(data, torch.arange(2))) is data.x


def test_molecules_go_in_by_name():
    class MPNN(nn.Module):
        def forward(self, bmg: Molecules, V_d: Tensor | None = None, X_d: Tensor | None = None) -> Tensor:
            return bmg.V

    batch = molecules()
    assert call(MPNN(), batch) is batch.bmg.V


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_networks_get_what_they_are_given():
    assert call(torch.jit.script(nn.Linear(3, 2)), X).shape == (4, 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (({"a": X}, (Y, Y)), "a tuple (dict of 1, tuple of 2)"),
        ({"image": X, "label": Y}, "a dict with 'image', 'label'"),
        (dict.fromkeys("abcdefgh", X), "a dict with 'a', 'b', 'c', 'd', 'e', 'f', …"),
        (Encoding(x=1), "an Encoding with 'x'"),
        ([1] * 12, "a list of 12 (int, int, int, int, int, int, …)"),
        (Scan(X, Y), "a Scan with 'image', 'mask', 'name'"),
        (3, "an int"),
    ],
)
def test_batches_are_described_by_their_parts(value: Any, text: str):
    assert describe(value) == text
