"""The fast predictor: one forward pass of the user's network, and a student of the exact engine on top."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import artefact
from .activations import Place, Recorder
from .batches import Inputs, as_tree, call, plain
from .export import export
from .head import Head, compare
from .likelihoods import LIKELIHOODS
from .linearize import Forward, Network, as_function, check_finite
from .posterior import Posterior
from .settings import Settings
from .student import Student, Translation

FORMAT = "lightning-ella-fast 1"


class FastPredictor(Head):
    """A trained network that knows how sure it is, for the price of one forward pass.

    Calling it with a batch gives a prediction of the class, and with the names, that the exact predictor gives. Its
    covariance is that of a student: what it knows of the K directions, and a variance of each output's own. So it knows
    each input by itself: for joint samples and differences ask the exact predictor. Of classes, variances are those of
    the logits minus their mean over the classes, which is all that probabilities depend on.

    `ELLAPredictor.distil` makes one.

    Args:
        model: the network, at the weights that the posterior was fitted with.
        student: says what the exact engine would.
        translation: makes outputs of what it says.
        places: where it looks.
        temperature: what the logits are divided by before they become probabilities, ().
        forward: how to call the network.
        settings: those of the exact predictor.
        origin: says which weights these are, in the error that refuses others.
        counted: names of parameters and buffers that a forward pass itself writes to.
        figures: how well it follows its teacher, on inputs that it was not taught on; see `ELLAPredictor.distil`.
    """

    made_again = (*Head.made_again, "_recorder")
    temperature: Tensor
    tempering: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        student: Student,
        translation: Translation,
        places: Sequence[Place],
        temperature: Tensor,
        forward: Forward = call,
        settings: Mapping[str, Any],
        origin: str = "",
        counted: Collection[str] = (),
        figures: Mapping[str, float] | None = None,
    ):
        super().__init__(model, forward, origin, counted)
        self.student, self.translation, self.places = student, translation, list(places)
        self.register_buffer("temperature", temperature)
        self.register_buffer("tempering", torch.ones_like(temperature))  # by which the student's is another
        self.settings, self.figures = dict(settings), dict(figures or {})
        self.likelihood = LIKELIHOODS[settings["likelihood"]].from_settings(self.settings)
        self._recorder: Recorder | None = None
        self.eval().requires_grad_(False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the parts; the view is made when it is needed."""
        super().__setstate__(state)
        self._recorder = None

    @torch.compiler.disable
    def forward(self, inputs: Inputs) -> Any:  # type: ignore
        """Predict for a batch.

        Raises:
            ValueError: if the model's weights are not the ones that the posterior was fitted with.
        """
        with self._lock, as_function():
            self._check_weights()
            own = tree_map(_constant, plain(as_tree(inputs), self.device))
            recorder = self._here(own)
            outputs, pooled = recorder(own)
            return self.predict(check_finite(outputs), pooled, recorder.network.output_shape)

    def predict(self, outputs: Tensor, pooled: Tensor, shape: tuple[int, ...] | None = None) -> Any:
        """The prediction for outputs (B, C) and pooled activations (B, A) of the network."""
        said = self.student(pooled, outputs)
        gaussian = self.translation(outputs, said)
        temperature = self.temperature.to(outputs)
        prediction = self.likelihood.predict(gaussian, self.settings["predictive"], temperature)
        prediction.axis = -1 if shape is None or shape else None
        if self.student.has_outside:
            prediction.novelty = said.novelty.squeeze(1).sigmoid().to(outputs)
        return prediction

    def follow(self, posterior: Posterior) -> Self:
        """Take another posterior over the same directions, as after `ELLAPredictor.update`."""
        self.translation.follow(posterior)
        self.temperature = posterior.temperature.to(self.temperature) * self.tempering
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write student and scales, without the network, as one safetensors file; see `ELLAPredictor.save`.

        Raises:
            OSError: if it cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "settings": json.dumps(self.settings),
            "fingerprint": json.dumps(self.fingerprint),
            "origin": self.origin,
            "counted": json.dumps(sorted(self.counted)),
            "places": json.dumps(self.places),
            "figures": json.dumps(self.figures),
        }
        return artefact.write(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, forward: Forward = call) -> Self:
        """Read a fast predictor and attach it to `model`, which must have the weights that it was taught with.

        Args:
            path: what `save` wrote.
            model: the network.
            forward: how to call it, if the fit was told (a function is not stored).

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if the file is no fast predictor, is not as it was written, or belongs to another network or to
                other weights.
        """
        found: dict[str, Any] = {}

        def accept(metadata: dict[str, str], shapes: artefact.Shapes) -> None:
            try:
                parts = {name: json.loads(metadata[name]) for name in ("fingerprint", "counted", "places", "figures")}
                found.update(
                    parts, origin=metadata["origin"], settings=asdict(Settings(**json.loads(metadata["settings"])))
                )
                found["places"] = [Place(*place) for place in found["places"]]
                rank = shapes["translation.root"][1][0]
                found["sizes"] = rank, shapes["translation.draws"][1][1] - rank
            except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
                raise ValueError(f"{path} cannot be read as a fast predictor ({error}): write it again.") from error
            compare(found["fingerprint"], model, found["counted"], f"the student in {path}", found["origin"])

        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        tensors, _ = artefact.read(path, FORMAT, device, accept)
        if not all(tensor.sum().isfinite() for tensor in tensors.values()):
            raise ValueError(f"{path} has numbers that are NaN or infinite: teach again.")
        rank, num_outputs = found.pop("sizes")
        fast = cls(
            model,
            student=Student(
                2 * sum(place.width for place in found["places"]),
                num_outputs,
                rank,
                has_outside=len(tensors["student.said_mean"]) > num_outputs * (rank + 1),
                invariant=LIKELIHOODS[found["settings"]["likelihood"]].invariant,
            ),
            translation=Translation(tensors["translation.root"], tensors["translation.draws"]),
            temperature=tensors["temperature"],
            forward=forward,
            **{name: found[name] for name in ("settings", "places", "figures", "origin", "counted")},
        )
        try:
            fast.to(device).load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"the tensors in {path} are not those of a fast predictor of this network: teach again."
            ) from error
        return fast

    def export(self, path: str | os.PathLike[str], example: Inputs) -> Path:
        """Write network and student as one program that needs neither this package nor the network's code.

        Args:
            path: ending in ".onnx" for ONNX, or in ".pt2" for `torch.export`.
            example: a batch of inputs. The program takes such, of any number of samples.

        Returns:
            the path. The program's outputs have the names that those of a prediction have: of classes `probs`,
            `entropy`, `mutual_information`, `logits_mean`, `logits_variance` and `novelty`; of numbers `mean`,
            `variance`, `lower` and `upper` (the interval of 90 %), and `novelty`.

        Raises:
            ValueError: for another ending, or if the network cannot be exported; the message says why.
            ImportError: if ONNX's packages are not installed.
        """
        with self._lock, as_function():
            self._check_weights()
            own = tree_map(_constant, plain(as_tree(example), self.device))
            network = Network(self.model, self.forward_function, self._names(), cast=lambda _, value: value.clone())
            network.settle(own)
            network.own(own)  # which tells the shape of its outputs
            return export(Path(path), Recorder(network, self.places), self, own)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.model.parameters()), self.temperature.device)

    def _here(self, inputs: Inputs) -> Recorder:
        """The network where it is now, and the student with it."""
        if self.temperature.device != self.device:
            self.to(self.device)
        if self._recorder is None or self._recorder.network.device != self.device:
            network = Network(self.model, self.forward_function, self._names())
            network.settle(inputs)
            self._recorder = Recorder(network, self.places)
        return self._recorder

    def _names(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if parameter.is_floating_point()]


def _constant(leaf: Any) -> Any:
    """A tensor without a graph that may be saved for a backward pass."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if leaf.is_inference() else leaf.detach()
