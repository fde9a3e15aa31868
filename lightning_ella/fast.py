"""The fast predictor: one forward pass of the user's network, and a student of the exact engine on top."""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import artefact
from .activations import Place, Recorder, both, chosen, pooled_width
from .augmentation import Views, restored, seen
from .batches import Inputs, as_tree, call, constant, plain
from .export import export
from .familiarity import Familiarity, Look, mean_of
from .guarantee import Guarantee
from .head import Head, compare
from .likelihoods import LIKELIHOODS
from .linearize import Forward, Network, as_function, as_values, check_finite
from .posterior import Posterior
from .predictions import Gaussian, mixed
from .settings import Settings
from .student import Said, Student, Translation

FORMAT = "lightning-ella-fast 1"
_FAMILIAR, _GUARANTEE = "familiarity.", "guarantee."  # what the names of their tensors begin with


class FastPredictor(Head):
    """A trained network that knows how sure it is, for the price of one forward pass.

    Calling it with a batch gives a prediction of the class, and with the names, that the exact predictor gives. Its
    covariance is that of a student: what it knows of the K directions, and a variance of each output's own. So it knows
    each input by itself: for joint samples and differences ask the exact predictor. Of classes, variances are those of
    the logits minus their mean over the classes, which is all that probabilities depend on (but for "probit").

    `ELLAPredictor.distil` makes one.

    Args:
        model: the network, at the weights that the posterior was fitted with.
        student: says what the exact engine would.
        translation: makes outputs of what it says.
        places: where it looks.
        output_shape: of what the network gives for one input, () or (C,).
        teacher: says which posterior it was taught by; see `ELLAPredictor.adopt`.
        forward: how to call the network.
        settings: those of the exact predictor.
        origin: says which weights these are, in the error that refuses others.
        counted: names of parameters and buffers that a forward pass itself writes to.
        figures: how well it follows its teacher, on inputs that it was not taught on; see `ELLAPredictor.distil`.
        familiarity: says how familiar an input looks, by what the student says of its novelty.
    """

    made_again = (*Head.made_again, "_recorder")
    student: Student
    translation: Translation
    familiarity: Familiarity | None

    def __init__(
        self,
        model: nn.Module,
        *,
        student: Student,
        translation: Translation,
        places: Sequence[Place],
        output_shape: Sequence[int],
        teacher: str,
        forward: Forward = call,
        settings: Mapping[str, Any],
        origin: str = "",
        counted: Collection[str] = (),
        figures: Mapping[str, float] | None = None,
        familiarity: Familiarity | None = None,
    ):
        super().__init__(model, forward, origin, counted)
        # Not registered, as the network is not: on its network, it would else enter the network's state_dict.
        object.__setattr__(self, "student", student.eval().requires_grad_(False))
        object.__setattr__(self, "translation", translation)
        object.__setattr__(self, "familiarity", familiarity)
        self.places, self.output_shape, self.teacher = list(places), tuple(output_shape), teacher
        self.settings, self.figures = {"views": (), **settings}, dict(figures or {})
        self.likelihood = LIKELIHOODS[settings["likelihood"]].from_settings(self.settings)
        self._recorder: Recorder | None = None

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
        with self._lock, as_values():
            own = tree_map(constant, plain(as_tree(inputs), self.device))
            recorder = self._here(own)
            looks = [recorder(seen(own, view)) for view in self.all_views]
            for outputs, _ in looks:
                check_finite(outputs)
            return self.predict(looks)

    def predict(self, looks: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """The prediction for outputs (B, C) and activations (B, ·) of the network, as it gives them for each view.

        Activations are those of `all_places`, pooled.
        """
        answers = [self.say(pooled, outputs) for outputs, pooled in looks]
        parts: list[Gaussian] = [self.translation(*pair) for pair in zip((f for f, _ in looks), answers, strict=True)]
        temperature = self.translation.temperature.to(looks[0][0])
        prediction = self.likelihood.predict(mixed(parts), self.settings["predictive"], temperature)
        prediction.axis, prediction.guarantee = -1 if self.output_shape else None, self.guaranteed
        if self.familiarity is not None:
            self.familiarity.tell(prediction, self.looks(looks, answers), self.likelihood)
        else:
            found = [novelty for said in answers if (novelty := _novelty(said, temperature)) is not None]
            prediction.novelty = mean_of(found) if found else None
        return prediction

    def say(self, pooled: Tensor, outputs: Tensor) -> Said:
        """What the student says of outputs (B, C) and activations (B, ·), those of `all_places`."""
        return self.student(chosen(pooled, self.places, self.all_places), outputs)

    def looks(self, looks: Sequence[tuple[Tensor, Tensor]], answers: Sequence[Said]) -> list[Look]:
        """What `familiarity` is told."""
        assert self.familiarity is not None
        parts, places = zip(looks, answers, strict=True), self.familiarity.places
        return [Look(f, chosen(a, places, self.all_places), _novelty(said, f)) for (f, a), said in parts]

    @property
    def all_places(self) -> list[Place]:
        """Where the student looks, and where `familiarity` does."""
        return both(self.places, [] if self.familiarity is None else self.familiarity.places)

    @property
    def familiar(self) -> dict[str, Any] | None:
        """What a file says of `familiarity`."""
        return None if self.familiarity is None else self.familiarity.described()

    def follow(self, posterior: Posterior) -> Self:
        """Take another posterior over the same directions, as after `ELLAPredictor.update`."""
        with self._lock:
            before = {name: value.clone() for name, value in self.translation.state_dict().items()}
            after = self.translation.follow(posterior).state_dict()
            if not all(torch.equal(after[name], value) for name, value in before.items()):
                self.guaranteed = None  # it was of another posterior
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write student and scales, without the network, as one safetensors file; see `ELLAPredictor.save`.

        Raises:
            OSError: if it cannot be written.
        """
        described = {name: getattr(self, name) for name in _DESCRIBED} | {"counted": sorted(self.counted)}
        described["settings"] = self._stored_settings()
        metadata = {name: json.dumps(value) for name, value in described.items()}
        return artefact.write(path, self.tensors(), metadata | {"format": FORMAT})

    def tensors(self) -> dict[str, Tensor]:
        """Those of student and translation, by name."""
        parts = {"student": self.student, "translation": self.translation}
        found = {f"{part}.{name}": value for part, kept in parts.items() for name, value in kept.state_dict().items()}
        familiar = {} if self.familiarity is None else self.familiarity.tensors()
        promised = {} if self.guaranteed is None else self.guaranteed.tensors()
        found |= {f"{_FAMILIAR}{name}": value for name, value in familiar.items()}
        return found | {f"{_GUARANTEE}{name}": value for name, value in promised.items()}

    def take(self, tensors: Mapping[str, Tensor]) -> Self:
        """Have other values in student and translation, by the same names."""
        for part, kept in {"student": self.student, "translation": self.translation}.items():
            kept.load_state_dict(artefact.named(tensors, f"{part}."))
        self.guaranteed = Guarantee.restored(artefact.named(tensors, _GUARANTEE))
        if self.familiar is not None:
            object.__setattr__(
                self, "familiarity", Familiarity.restored(self.familiar, artefact.named(tensors, _FAMILIAR))
            )
        return self

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module, forward: Forward = call, views: Views | None = None
    ) -> Self:
        """Read a fast predictor and attach it to `model`, which must have the weights that it was taught with.

        Args:
            path: what `save` wrote.
            model: the network.
            forward: how to call it, if the fit was told (a function is not stored).
            views: those of the fit, in their order, if there are functions among them; names are in the file.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if the file is no fast predictor, is not as it was written, or belongs to another network or to
                other weights.
        """
        made: dict[str, Self] = {}

        def accept(metadata: dict[str, str], shapes: artefact.Shapes) -> None:
            try:
                known = {name: json.loads(metadata[name]) for name in _DESCRIBED if name != "familiar"}
                known["familiar"] = json.loads(metadata.get("familiar", "null"))
                theirs = {name: str(known["fingerprint"][name]) for name in ("network", "weights")}
                known["counted"] = [str(name) for name in known["counted"]]
                known["places"] = [Place.checked(*place) for place in known["places"]]
                names = [str(name) for name in known["settings"].pop("views", ())]
                known["settings"] = Settings(**known["settings"]).as_dict()
                known["figures"] = {str(name): float(value) for name, value in known["figures"].items()}
                sizes = _sizes(shapes, known["places"])
                if promised := artefact.named(shapes, _GUARANTEE):
                    Guarantee.check(promised)
                if known["familiar"] is not None:
                    Familiarity.check(known["familiar"], artefact.named(shapes, _FAMILIAR))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path} cannot be read as a fast predictor ({error}): write it again.") from error
            compare(theirs, model, known["counted"], f"the student in {path}", str(known["origin"]))
            known["settings"]["views"] = restored(names, views)
            made["fast"] = fast = cls._of_sizes(model, forward, known, sizes, artefact.named(shapes, _FAMILIAR))
            modules = {name for name, _ in model.named_modules()}
            if missing := [place.module for place in fast.all_places if place.module not in modules]:
                raise ValueError(
                    f"the student in {path} looks at {missing[0]!r}, which the network has not: teach again."
                )
            kinds = {torch.float32: "F32", torch.float64: "F64"}
            rest = {name: shape for name, shape in shapes.items() if not name.startswith(_GUARANTEE)}
            if rest != {name: (kinds[value.dtype], tuple(value.shape)) for name, value in fast.tensors().items()}:
                raise ValueError(f"the tensors in {path} are not those of a student of this network: teach again.")

        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        tensors, _ = artefact.read(path, FORMAT, device, accept)
        if not all(tensor.sum().isfinite() for tensor in tensors.values()):
            raise ValueError(f"{path} has numbers that are NaN or infinite: teach again.")
        if min(tensors[f"translation.{name}"] for name in ("scale", "temperature", "tempering")) <= 0:
            raise ValueError(f"{path} has a scale that is not positive: teach again.")
        return made["fast"].to(device).take(tensors)

    @classmethod
    def _of_sizes(
        cls, model: nn.Module, forward: Forward, known: dict[str, Any], sizes: "_Sizes", familiar: artefact.Shapes
    ) -> Self:
        """One whose numbers are not yet known."""
        zeros = {name: torch.zeros(shape) for name, (_, shape) in familiar.items()}
        num_outputs, rank, samples, has_outside = sizes
        how = {"has_outside": has_outside, "invariant": LIKELIHOODS[known["settings"]["likelihood"]].invariant}
        return cls(
            model,
            student=Student(pooled_width(known["places"]), num_outputs, rank, **how),
            translation=Translation(torch.eye(rank), torch.zeros(samples, rank + num_outputs)),
            forward=forward,
            familiarity=Familiarity.restored(known["familiar"], zeros) if known["familiar"] else None,
            **{name: known[name] for name in _DESCRIBED if name not in ("fingerprint", "familiar")},
        )

    def export(self, path: str | os.PathLike[str], example: Inputs) -> Path:
        """Write network and student as one program that needs neither this package nor the network's code.

        Args:
            path: ending in ".onnx" for ONNX, or in ".pt2" for `torch.export`.
            example: a batch of inputs. The program takes any number of samples; all other lengths are as here.

        Returns:
            the path. The program's outputs have the names that those of a prediction have: of classes `probs`,
            `entropy`, `mutual_information`, `logits_mean` and `logits_variance`; of numbers `mean`, `variance`,
            `lower` and `upper` (the interval of 90 %); of both `novelty`, `distance`, `energy` and `familiarity`,
            those that there are.

        Raises:
            ValueError: for another ending, or if the network cannot be exported; the message says why.
            ImportError: if ONNX's packages are not installed.
        """
        with self._lock, as_function():
            own = tree_map(constant, plain(as_tree(example), self.device))
            self._here(own)
            return export(Path(path), self._recording(own, lambda _, value: value.clone()), self, own)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.model.parameters()), self.translation.scale.device)

    def _here(self, inputs: Inputs) -> Recorder:
        """The network as it is now, and where, and the student with it."""
        if self._check_weights():
            self._recorder = None  # its type may be another
        device = self.device
        if self.translation.scale.device != device:
            self.to(device)
        if self._recorder is None or self._recorder.network.device != device:
            self._recorder = self._recording(inputs).fold(inputs)
        return self._recorder

    def _recording(self, inputs: Inputs, cast: Callable[[str, Tensor], Tensor] = lambda _, value: value) -> Recorder:
        names = [name for name, parameter in self.model.named_parameters() if parameter.is_floating_point()]
        network = Network(self.model, self.forward_function, names, cast=cast)
        network.settle(inputs)
        network.output_shape = self.output_shape
        return Recorder(network, self.all_places, self.places)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        moved = lambda tensor: tensor.to(fn(tensor).device)  # noqa: E731 - the student keeps its own types
        self.student._apply(moved)
        self.translation._apply(moved)
        if self.familiarity is not None:
            self.familiarity._apply(moved)
        return self


# What a file says of a student, beside its tensors.
_DESCRIBED = (
    "fingerprint",
    "counted",
    "places",
    "output_shape",
    "teacher",
    "settings",
    "origin",
    "figures",
    "familiar",
)


def _novelty(said: Said, like: Tensor) -> Tensor | None:
    """(B,), in [0, 1], of the type of the outputs; None without probes."""
    return said.novelty.squeeze(1).sigmoid().to(like) if said.novelty.shape[1] else None


_Sizes = tuple[int, int, int, bool]  # C, K, S and whether there are probes


def _sizes(shapes: artefact.Shapes, places: Sequence[Place]) -> _Sizes:
    """Those of a student, from the tensors of a file."""
    rank = shapes["translation.root"][1][0]
    samples, columns = shapes["translation.draws"][1]
    num_outputs = columns - rank
    said = shapes["student.said_mean"][1][0]
    if min(rank, samples, num_outputs) < 1 or max(said, pooled_width(places)) > 2**24:
        raise ValueError("no sizes of a student")
    return num_outputs, rank, samples, said > num_outputs * (rank + 1)
