"""Programs that need neither this package nor the network's code: `torch.export` and ONNX."""

from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .activations import Recorder
from .augmentation import through
from .batches import Inputs, num_samples, rows
from .familiarity import PARTS
from .linearize import twice
from .predictions import ClassPrediction, LabelPrediction, Mixture, NormalPrediction, Spread, mixed

if TYPE_CHECKING:
    from .fast import FastPredictor

LEVEL = 0.9  # of the interval from `lower` to `upper`


def export(path: Path, recorder: Recorder, fast: "FastPredictor", example: Inputs) -> Path:
    """Write a program; see `FastPredictor.export`."""
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{path.name} ends neither in .onnx nor in .pt2, by which the kind of program is chosen.")
    if path.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError("ONNX needs two packages more: pip install onnx onnxscript.") from error
    few = rows(example, slice(0, 2))  # which the program keeps
    example = twice(few) if num_samples(few) == 1 else few  # a batch of one would be taken for fixed
    example = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)
    served = Served(recorder, fast).eval()
    batch = torch.export.Dim("batch")
    shapes = tree_map(lambda leaf: {0: batch} if isinstance(leaf, Tensor) and leaf.ndim else None, example)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        program = torch.export.export(served, (example,), dynamic_shapes=(shapes,), strict=False)
        if path.suffix == ".pt2":
            torch.export.save(program, path)
        else:
            names = list(served(example))
            made = torch.onnx.export(program, (), output_names=names, dynamo=True, verbose=False)
            assert made is not None
            _rename_others(made.model.graph, names)
            made.save(path, external_data=False)
    except (ImportError, OSError):
        raise
    except Exception as error:  # whatever a network does that no program can
        reason = str(error).strip().split("\n")[0]
        if "specialized" in str(error):
            reason = "something in it fixes the number of samples, as len(x) does: use x.shape[0]."
        raise ValueError(f"the network cannot be written as a program of {path.suffix}: {reason}") from error
    return path


def _rename_others(graph: Any, names: Collection[str]) -> None:
    """Leave the outputs' names to the outputs: operations are named after what they do, `mean` for one."""
    outputs = set(map(id, graph.outputs))
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.name in names and id(value) not in outputs:
            value.name = f"{value.name}_within"


class Served(nn.Module):
    """Network and student as a function from inputs to named tensors, without anything that a program cannot be.

    Args:
        recorder: evaluates the network.
        fast: knows the student.
    """

    def __init__(self, recorder: Recorder, fast: "FastPredictor"):
        super().__init__()
        self.network = recorder.network.model
        self.student, self.translation = fast.student, fast.translation
        self._recorder, self._fast = [recorder], [fast]  # not registered: their networks are others

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """What a prediction says of a batch, by name."""
        [recorder], [fast] = self._recorder, self._fast
        network = recorder.network
        looks = []
        for view in fast.all_views:
            own = through(inputs, view)
            outputs = network._forward(network.model, own)
            outputs = getattr(outputs, "logits", getattr(outputs, "prediction", outputs))
            outputs = outputs.reshape(-1, fast.student.num_outputs)  # which some squeeze
            looks.append((outputs, recorder.pooled(own, outputs)))
        prediction = fast.predict(looks)
        logits = prediction.logits
        parts = logits.parts if isinstance(logits, Mixture) else [logits]
        prediction.logits = mixed([Whole(**{f.name: getattr(part, f.name) for f in fields(part)}) for part in parts])
        said = {name: getattr(prediction, name) for name in _names(prediction)}
        if isinstance(prediction, NormalPrediction):
            away = NormalDist().inv_cdf((1 + LEVEL) / 2) * said["variance"].sqrt()
            said["lower"], said["upper"] = said["mean"] - away, said["mean"] + away
        foreign = {name: getattr(prediction, name) for name in (*PARTS, "familiarity")}
        return said | {name: value for name, value in foreign.items() if value is not None}


class Whole(Spread):
    """All draws at once: how many samples there are is not known when a program is written."""

    def in_parts(self) -> Iterator[Tensor]:
        """Outputs (S, *, C)."""
        yield self.samples()


def _names(prediction: Any) -> tuple[str, ...]:
    """What a program says: all that needs no random numbers."""
    if isinstance(prediction, ClassPrediction | LabelPrediction):
        return "probs", "entropy", "mutual_information", "logits_mean", "logits_variance"
    moments = ("mean", "variance") if prediction.likelihood.has_moments else ()
    return *moments, "logits_mean", "logits_variance"
