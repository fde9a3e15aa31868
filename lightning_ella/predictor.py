"""The head: from inputs to a predictive distribution, with save and load."""

import hashlib
import json
import logging
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, SupportsFloat

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import artefact
from .activations import Layers
from .augmentation import OneView, Views, names_of, restored, seen
from .batches import Inputs, Picked, Unpack, as_tree, call, constant, inputs_and_targets, plain
from .copies import Cast
from .curvature import curvature
from .data import Points, points_of, seeded
from .distil import MOST_TUNED, NUM_POINTS, distil
from .distributed import World
from .engine import Linearization
from .evidence import Evidence, measure
from .familiarity import Familiarity, look_at, mean_of
from .fast import FastPredictor
from .guarantee import Guarantee, Spent
from .head import Head, compare
from .learning import Learnt, figures_of, learn
from .likelihoods import LIKELIHOODS
from .linearize import Basis, Forward, as_function
from .numerics import spread_normal
from .observations import Observations, joined, matched, observations
from .perturb import Perturb
from .posterior import SCALES, Posterior
from .predictions import ClassPrediction, Gaussian, mixed, shaped
from .residual import novelty, with_probes
from .settings import Settings, at_least_one
from .top import Selection

log = logging.getLogger(__name__)

FORMAT = "lightning-ella 5"
MAX_HELD = 100_000  # points of a stream that are learnt from at once
MAX_DRAWN = 2**28  # numbers S (K + m): a file may not ask for more


class ELLAPredictor(Head):
    """A trained network that knows how sure it is.

    Calling it with a batch of inputs gives a prediction with `probs`, `entropy`, `mutual_information`, `familiarity`,
    `logits_mean` and `logits_covariance`. The same input always gets the same answer: the Monte Carlo draws are fixed
    by `seed` and shared by all inputs.

    Args:
        model: the network whose posterior this is, at the weights that it was fitted with.
        basis: V, parameter name -> (K, *shape), orthonormal; or V and the m probes after it, (K + m, *shape).
        eigenvalues: (K,), of the kernel: those of the landmarks' Gram matrix / M.
        curvature: H, (K, K), summed over all N training points.
        prior_variance: σ₀², the variance of every parameter before the data, ().
        covariance_scale: the multiplier of the posterior covariance, (); 1 is the plain posterior.
        residual_scale: the variance of every parameter outside the span of V, ().
        temperature: what the logits are divided by before they become probabilities, ().
        forward: how to call the network.
        settings: the other numbers and names that predictions depend on: `likelihood`, `predictive`, `num_samples`,
            `seed`, `residual` (m), and those of `Linearization`.
        origin: says which weights these are, in the error that refuses others: the name of a checkpoint.
        counted: names of parameters and buffers that a forward pass itself writes to, which are no weights.
        batched: whether samples cannot be told apart by slicing the inputs, as in a batched graph.
        quiet: whether how features are computed has been said.
        mean: m, (K,), of the coordinates along the basis, where the fit itself moved it; None is zero.
        learnt: what was learnt from labelled points after the fit (`update`); None is nothing.
        familiarity: says how familiar an input looks; None where there were no unseen points.
        guaranteed: what points that the fit left alone say about any that come.
        spent: points that it did not leave alone.

    It may be asked by several threads at once, while others call, move or train the network: what it evaluates is a
    view of its own, and one thread is answered after the other.
    """

    made_again = (*Head.made_again, "_linearization", "_view", "_students")
    draws: Tensor
    fast: FastPredictor | None  # the student that was taught last
    familiarity: Familiarity | None

    def __init__(
        self,
        model: nn.Module,
        *,
        basis: Basis,
        eigenvalues: Tensor,
        curvature: Tensor,
        prior_variance: Tensor,
        covariance_scale: Tensor,
        residual_scale: Tensor,
        temperature: Tensor,
        forward: Forward = call,
        settings: Mapping[str, Any],
        origin: str = "",
        counted: Collection[str] = (),
        batched: bool = False,
        quiet: bool = False,
        mean: Tensor | None = None,
        learnt: Learnt | None = None,
        familiarity: Familiarity | None = None,
        guaranteed: Guarantee | None = None,
        spent: Spent | None = None,
    ):
        super().__init__(model, forward, origin, counted)
        self.eigenvalues, self.curvature = eigenvalues, curvature
        self.prior_variance, self.covariance_scale = prior_variance, covariance_scale
        self.residual_scale, self.temperature = residual_scale, temperature
        self.mean = curvature.new_zeros(len(curvature)) if mean is None else mean
        self.learnt, self._taught = learnt, learnt is not None  # taught: whether anything was ever learnt
        self._tangents = dict(basis)
        if len(next(iter(basis.values()))) == self.rank:
            with_probes(self._tangents, settings["residual"], settings["seed"])
        self.settings, self.batched = {"views": (), **settings}, batched
        self.likelihood = LIKELIHOODS[settings["likelihood"]].from_settings(self.settings)
        draws = spread_normal(settings["num_samples"], self.rank + settings["residual"], settings["seed"])
        self.draws = draws.to(curvature.device)
        object.__setattr__(self, "familiarity", familiarity)  # not registered: it keeps its own types
        self.guaranteed, self.spent = guaranteed, spent
        self._quiet = quiet
        self._view: tuple[Forward, Linearization] | None = None
        self._students: weakref.WeakSet[FastPredictor] = weakref.WeakSet()
        self.fast = None
        if more := self._linearization.network.view.counted - self.counted:
            self._recognise(self.counted | more)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the parts; the view is made when it is needed."""
        super().__setstate__(state)
        self._view, self._students = None, weakref.WeakSet([self.fast] if self.fast else [])

    @cached_property
    def _linearization(self) -> Linearization:
        return self._linearized(self.forward_function)

    @torch.compiler.disable
    def forward(self, inputs: Inputs) -> Any:  # type: ignore
        """Predict for a batch; works under `inference_mode`, in train mode and on any device that the model is on.

        Raises:
            ValueError: if the model's weights are not the ones that the posterior was fitted with.
        """
        return self._predict(inputs)[0]

    def log_prob(self, inputs: Inputs, targets: Tensor) -> Tensor:
        """Log p(y), (B,), nats: of classes that `top_outputs` does not keep, too, by the network's own p among them."""
        prediction, kept = self._predict(inputs, targets)
        return prediction.log_prob(targets) + (0 if kept is None else kept.others)

    def _predict(self, inputs: Inputs, targets: Tensor | None = None) -> tuple[Any, Selection | None]:
        with self._lock, as_function():
            looks = [self._look(inputs, targets=targets, view=view) for view in self.all_views]
            posterior, (_, features, kept) = self.posterior, looks[0]
            gaussian = mixed([posterior.outputs(mean, along, self.draws.to(along)) for mean, along, _ in looks])
            temperature = posterior.temperature.to(features)
            prediction = self.likelihood.predict(gaussian, self.settings["predictive"], temperature)
            prediction.axis, prediction.guarantee = self.axis, self.guaranteed
            if kept is not None and isinstance(prediction, ClassPrediction):
                prediction.indices = kept.indices
            if self.familiarity is None and features.shape[-1] > self.rank:
                foreign = [novelty(along, self.rank, centred=self.likelihood.invariant) for _, along, _ in looks]
                prediction.novelty = mean_of(foreign)
            if self.familiarity is not None:
                linearization = self._here()
                own = self._own_inputs(inputs, linearization)
                features = [along for _, along, _ in looks]
                how = self.all_views, features, self.rank, self.likelihood
                seen_so = look_at(linearization, self.familiarity.places, own, *how)
                self.familiarity.tell(prediction, seen_so, self.likelihood)
            return prediction, kept

    def features(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Outputs f(x) (B, C), and features [Ψ, Ψ⊥] (B, C, K + m) along the basis and the m probes.

        Where the network has several positions, (B, *, C) and (B, *, C, K + m), wherever it has its C itself.

        Raises:
            ValueError: if the model's weights are not the ones that the posterior was fitted with.
        """
        return self._look(inputs)[:2]

    def sample_functions(self, num_functions: int, seed: int = 0) -> "SampledFunctions":
        """Draw S networks from the posterior, as functions that can be evaluated anywhere.

        One draw of the weights is one function, so its values at different inputs belong together: for Thompson
        sampling, active learning, or the distribution of anything that depends on several outputs at once.
        """
        self._refuse_top("sample(), or outputs(inputs, forward)")
        generator = torch.Generator().manual_seed(seed)
        return SampledFunctions(self, torch.randn(num_functions, self.draws.shape[1], generator=generator))

    def outputs(self, inputs: Inputs, forward: Forward | None = None) -> Gaussian:
        """The Gaussian over the outputs of inputs as they are, before likelihood and temperature, channels last.

        Args:
            inputs: a batch.
            forward: another function of the same network, `(model, inputs) -> outputs`: a reward model that was fitted
                on pairs gives the score of one answer, a classifier its features. All share one posterior, so a
                difference such as `outputs(a) - outputs(b)` has the variance that it should.
        """
        if forward is None:
            self._refuse_top("outputs(inputs, forward)")
        with self._lock, as_function():
            logits, features, _ = self._look(inputs, forward)
            return self.posterior.outputs(logits, features, self.draws.to(features))

    def distil(
        self,
        loader: DataLoader,
        unpack: Unpack = inputs_and_targets,
        *,
        layers: Layers = None,
        perturb: Perturb | None = None,
        num_points: int = NUM_POINTS,
        distributed: bool = False,
    ) -> FastPredictor:
        """Teach a student what this predictor says, and return a predictor for the price of one forward pass.

        The student is a small network on what yours computes anyway: pooled activations at a few places, and outputs.
        It learns from unseen points and from changed copies of them (noise, contrast, mixtures, blur, other order of
        positions; in texts other tokens), and is tested on a fifth of them, which it is not taught on.

        Args:
            loader: labelled points that the network has not been trained on, such as those that calibrated it.
            unpack: maps a batch to `(inputs, targets)` or `(inputs, targets, weights)`.
            layers: names or patterns of the modules whose outputs the student sees; None finds stem and stages of a
                convolutional network, blocks of a transformer, layers of a small network.
            perturb: maps a batch of inputs to a changed copy of it; None knows images, series, vectors and tokens.
            num_points: of the loader, that the exact engine is asked about, and as many copies.
            distributed: share the work with all processes of torch.distributed's default group, each of which must call
                this with the same data; all get the same student.

        Returns:
            the fast predictor. Its `figures` say how well it follows: correlations of log-variances and of novelty,
            and the NLL, beside the exact one. It follows this predictor's `update` and `forget`.

        Raises:
            ValueError: if network or data are not of a kind that a student can learn: several rows of outputs an input,
                samples that cannot be told apart, fewer than ten points.
        """
        at_least_one("num_points", num_points)
        world = World.of_all(self.device) if distributed else World()
        points = _shared(lambda: points_of(loader, unpack, num_points + MOST_TUNED), world)
        with world.quiet():
            return self.teach(points, world, layers=layers, perturb=perturb, num_points=num_points)

    def teach(self, points: Points, world: World, **how: Any) -> FastPredictor:
        """As `distil`, from points that are numbered already; `how` is as for the function `distil`."""
        with self._reading():
            return self.adopt(distil(self, points, world, **how))

    def adopt(self, fast: FastPredictor) -> FastPredictor:
        """Keep a student of this posterior, such as one from a file: it follows `update` and `forget` from now on.

        Raises:
            ValueError: if it was taught by another posterior.
        """
        if fast.teacher != self.identity:
            raise ValueError("this student was taught by another posterior: load that one, or teach again.")
        self._students.add(fast.follow(self.posterior))
        object.__setattr__(self, "fast", fast)  # not registered: it has a file of its own
        return fast

    @property
    def identity(self) -> str:
        """Which directions of which weights these are, seen through which views."""
        values = " ".join(f"{value:.5e}" for value in self.eigenvalues.tolist())
        drawn = [self.settings[name] for name in ("likelihood", "residual", "seed")]
        drawn += names_of(self.settings["views"])
        return hashlib.sha256(f"{self.fingerprint['weights']} {drawn} {values}".encode()).hexdigest()

    def update(
        self,
        loader: DataLoader,
        unpack: Unpack = inputs_and_targets,
        *,
        drift: float | None = None,
        distributed: bool = False,
    ) -> Self:
        """Learn from labelled points, of a domain that may have changed: the mean moves, and the covariance shrinks.

        A Bayesian update of the linearised network f + Ψ w: w ~ N(m, S) becomes N(m, S + τ I) by a drift τ, and then
        what all points learnt since the fit say, by Newton's method in K dimensions; of a regression exactly. So order
        and parts do not matter. The network keeps its weights; `learnt` says what was chosen and gained, and keeps the
        points' features, n C (K + m) numbers.

        Args:
            loader: labelled points.
            unpack: maps a batch to `(inputs, targets)` or `(inputs, targets, weights)`.
            drift: τ, the variance by which each parameter may have moved since the fit. 0 is Bayes' rule, for more
                data of the same kind. None chooses how far the mean may move by how well each point is predicted from
                the others: not at all, by Bayes' rule with a narrower prior, by Bayes' rule, or with a drift; and then
                the temperature anew. Of fewer than 30 points it chooses neither drift nor temperature.
            distributed: share the work with all processes of torch.distributed's default group, each of which must call
                this with the same data.

        Returns:
            this predictor.

        Raises:
            ValueError: if the points cannot be used, or have another drift than those learnt before. The predictor is
                then as it was.
        """
        if self.settings["views"]:
            raise ValueError(
                "update() learns from inputs as they are, and the scales here are those of several views= of each: fit "
                "without views= what is to learn later."
            )
        if drift is not None and not (isinstance(drift, SupportsFloat) and 0 <= float(drift) < float("inf")):
            raise ValueError(f"drift={drift!r} must be a number of at least 0, or None to choose it.")
        drift = None if drift is None else float(drift)
        with self._lock:
            before = self.learnt
            if before is not None and drift != before.given_drift:
                raise ValueError(
                    f"the points learnt before have drift={before.given_drift}, and all points have the same: pass "
                    "that, or forget them first."
                )
            world = World.of_all(self.device) if distributed else World()
            new = self._observed(loader, unpack, world)
            with world.quiet():
                self._learn(new if before is None else joined([before.points, new]), drift)
        return self

    def forget(self, loader: DataLoader, unpack: Unpack = inputs_and_targets, *, distributed: bool = False) -> Self:
        """Take points back that were learnt by `update`: all is as if they had never been.

        If nothing was ever learnt since the fit, the points are taken for training points: what they contributed to the
        curvature is taken out. What they did to the weights stays, for which training again is the only way.

        Raises:
            ValueError: if some points were not learnt, or if the curvature was sampled, or would not be one any more:
                the predictor is then as it was. For training points that cannot always be told, least where the
                curvature was estimated from some of them.
        """
        with self._lock:
            if self.learnt is None and not self._taught:
                return self._forget_training(loader, unpack)
            world = World.of_all(self.device) if distributed else World()
            some = self._observed(loader, unpack, world)
            kept = None if self.learnt is None else matched(some, self.learnt.points)
            if self.learnt is None or kept is None:
                raise ValueError(
                    "some of these points were not among those that the posterior has learnt since its fit, so it "
                    "cannot forget them: pass the loader, and the transforms, that update() got."
                )
            if len(kept.logits):
                with world.quiet():
                    self._learn(kept, self.learnt.given_drift)
            else:
                self._follow_points(None)
        return self

    def evidence(self, loader: DataLoader, unpack: Unpack = inputs_and_targets) -> Evidence:
        """The marginal likelihood of the data, as a function of prior variance and noise that has gradients.

        Args:
            loader: the training data, each of which is visited once.
            unpack: maps a batch to `(inputs, targets)`.
        """
        with self._lock:
            both = self._curvature_of(loader, unpack, probes=True)
            with self._reading():
                return measure(self._here(), self._all(loader, unpack), self.likelihood, both, self.rank)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.model.parameters()), self._linearization.device)

    @property
    def axis(self) -> int | None:
        """Where the network's last outputs had their C; None where they had no such axis."""
        return self._linearization.axis

    @property
    def basis(self) -> dict[str, Tensor]:
        """V, parameter name -> (K, *shape)."""
        return {name: tangents[: self.rank] for name, tangents in self._tangents.items()}

    @property
    def posterior(self) -> Posterior:
        """The Gaussian over the coordinates of the basis and of the probes, after all that was learnt."""
        with self._lock, as_function():
            self._follow()
        fitted, learnt = self._fitted, self.learnt
        if learnt is None:
            return fitted
        return replace(fitted, mean=learnt.mean, precision=learnt.precision, temperature=learnt.temperature)

    @property
    def _fitted(self) -> Posterior:
        """As it was after the fit."""
        return Posterior(self.curvature, *(getattr(self, name) for name in SCALES), mean=self.mean)

    @property
    def rank(self) -> int:
        """K, the number of directions kept."""
        return len(self.curvature)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the posterior, without the network, as one safetensors file; it replaces an older one in one step.

        Raises:
            OSError: if it cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "settings": json.dumps(self._stored_settings()),
            "fingerprint": json.dumps(self.fingerprint),
            "origin": self.origin,
            "counted": json.dumps(sorted(self.counted)),
            "batched": json.dumps(self.batched),
        }
        tensors = {name: getattr(self, name) for name in _PARTS}
        tensors |= {f"basis.{name}": tangents for name, tangents in self.basis.items()}
        if self.familiarity is not None:
            tensors |= {f"{_FAMILIAR}{name}": value for name, value in self.familiarity.tensors().items()}
            metadata["familiarity"] = json.dumps(self.familiarity.described())
        if self.guaranteed is not None:
            tensors |= {f"{_GUARANTEE}{name}": value for name, value in self.guaranteed.tensors().items()}
        if self.spent is not None:
            tensors[_SPENT], metadata[_SPENT] = self.spent.numbers, self.spent.identity
        if self.learnt is not None:
            tensors |= {f"{_LEARNT}{name}": value for name, value in self.learnt.tensors().items()}
            metadata["learnt"] = json.dumps(self.learnt.described())
        return artefact.write(path, tensors, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module, forward: Forward = call, views: Views | None = None
    ) -> Self:
        """Read a posterior and attach it to `model`, which must have the weights that it was fitted with.

        Args:
            path: what `save` wrote.
            model: the network.
            forward: how to call it, if the fit was told (a function is not stored).
            views: those of the fit, in their order, if there are functions among them; names are in the file.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if the file is no posterior, is not as it was written, or belongs to another network or to
                other weights.
        """
        described: dict[str, Any] = {}
        learnt: dict[str, Any] = {}
        familiar: dict[str, Any] = {}

        def accept(metadata: dict[str, str], shapes: artefact.Shapes) -> None:
            try:
                origin, theirs = metadata["origin"], json.loads(metadata["fingerprint"])
                theirs = {name: str(theirs[name]) for name in ("network", "weights")}
                counted = [str(name) for name in json.loads(metadata.get("counted", "[]"))]
                batched = bool(json.loads(metadata.get("batched", "false")))
                stored = json.loads(metadata["settings"])
                names = [str(name) for name in stored.pop("views", ())]
                settings = Settings(**stored).as_dict()
                if any(name.startswith(_LEARNT) for name in shapes):
                    told = json.loads(metadata["learnt"])
                    learnt.update({name: told[name] for name in Learnt.DESCRIBED})
                if any(name.startswith(_FAMILIAR) for name in shapes):
                    familiar.update(json.loads(metadata["familiarity"]))
                    Familiarity.check(familiar, artefact.named(shapes, _FAMILIAR))
                if promised := artefact.named(shapes, _GUARANTEE):
                    Guarantee.check(promised)
                if _SPENT in shapes and (shapes[_SPENT][0] != "I64" or len(shapes[_SPENT][1]) != 1):
                    raise ValueError(f"no numbers of points: {shapes[_SPENT]}")
                described["identity_of_spent"] = metadata.get(_SPENT, "")
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path} cannot be read as a posterior ({error}): write it again.") from error
            compare(theirs, model, counted, f"the posterior in {path}", origin)
            settings["views"] = restored(names, views)
            beside = (_FAMILIAR, _GUARANTEE, _SPENT)
            rest = {name: shape for name, shape in shapes.items() if not name.startswith(beside)}
            _check_shapes(rest, model, settings, path)
            described.update(settings=settings, origin=origin, counted=counted, batched=batched)

        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        tensors, _ = artefact.read(path, FORMAT, device, accept)
        if not all(tensor.sum().isfinite() for tensor in tensors.values()):
            raise ValueError(f"{path} has numbers that are NaN or infinite: fit again.")
        parts = {name: tensors.pop(name) for name in _PARTS}
        if min(parts[name] for name in SCALES) <= 0:
            raise ValueError(f"{path} has a variance that is not positive: fit again.")
        if afterwards := artefact.named(tensors, _LEARNT):
            described["learnt"] = Learnt.of(afterwards, **learnt)
        modules = {name for name, _ in model.named_modules()}
        if missing := [place[0] for place in familiar.get("places", ()) if place[0] not in modules]:
            log.warning(
                "ELLA: predictions have no familiarity, since that in %s looks at %r, which the network has not: fit "
                "again, or give that module its name back.",
                *(path, missing[0]),
            )
        elif familiar:
            described["familiarity"] = Familiarity.restored(familiar, artefact.named(tensors, _FAMILIAR))
        described["guaranteed"] = Guarantee.restored(artefact.named(tensors, _GUARANTEE))
        identity = described.pop("identity_of_spent")
        if _SPENT in tensors:
            described["spent"] = Spent(identity, tensors[_SPENT].cpu())
        basis = artefact.named(tensors, "basis.")
        return cls(model, basis=basis, forward=forward, **described, **parts)  # type: ignore[arg-type]

    def _look(
        self,
        inputs: Inputs,
        forward: Forward | None = None,
        targets: Tensor | None = None,
        view: OneView | None = None,
    ) -> tuple[Tensor, Tensor, Selection | None]:
        with self._lock, as_function():
            linearization = self._here() if forward is None else self._through(forward)
            top = self.settings["top_outputs"] if forward is None else None
            own = self._own_inputs(inputs, linearization, view)
            temperature = 1.0 if top is None else float(self.temperature)
            return linearization.look(own, self._tangents, top, targets, temperature)

    def _own_inputs(self, inputs: Inputs, linearization: Linearization, view: OneView | None = None) -> Inputs:
        """Inputs whose samples can be told apart, seen through a view: those of a batched graph by the outputs."""
        inputs = seen(tree_map(constant, plain(as_tree(inputs), self.device)), view)
        lengths = {len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim}
        if isinstance(inputs, Picked) or (len(lengths) == 1 and not self.batched):
            return inputs
        outputs = linearization.network.outputs_of(inputs)
        return Picked(inputs, torch.arange(len(outputs)))

    def _refuse_top(self, instead: str) -> None:
        if self.settings["top_outputs"] is not None:
            raise ValueError(
                f"with top_outputs= every input has other outputs, which cannot be compared: use {instead} that gives "
                "the outputs that you compare."
            )

    def _observed(self, loader: DataLoader, unpack: Unpack, world: World) -> Observations:
        """Features of all points of a loader and their targets, on the CPU of every process.

        Raises:
            ValueError: if some cannot be used, or all of them cannot be held.
        """
        top, parts = self.settings["top_outputs"], []
        held = 0 if self.learnt is None else self.learnt.points.features.nbytes
        points = _shared(lambda: self._all(loader, unpack), world)
        with self._reading(), world.together("the points to learn from"):
            linearization = self._here()
            budget, temperature = linearization.memory_budget, 1.0 if top is None else float(self.temperature)
            batches = points.batches(world.share(points.numbers), self.device)
            for number, batch in enumerate(tqdm(batches, desc="ELLA learns", unit="batch", disable=not world.first)):
                options = {"top": top, "temperature": temperature}
                for part in observations(linearization, self.likelihood, batch, self._tangents, **options):
                    if not (part.logits.isfinite().all() and part.features.isfinite().all()):
                        raise ValueError(
                            f"the network's outputs, or their derivatives, are NaN or infinite in batch {number}: "
                            "leave those points out."
                        )
                    parts.append(_owned(part.to(torch.device("cpu"))))
                    held += parts[-1].features.nbytes * world.size
                    if held > budget:
                        raise ValueError(
                            f"the features of these points take more than memory_budget={budget} bytes: pass fewer "
                            "points, or give most positions of each the label -100."
                        )
        everywhere = world.everyone(joined(parts) if parts else None)
        found = [each for each in everywhere if each is not None and len(each.logits)]
        if not found:
            raise ValueError(
                "no point of the loader has a target that counts: pass one with labels."
                if len(points)
                else "the loader has no points: pass one with data."
            )
        return joined(found)

    def _learn(self, points: Observations, drift: float | None) -> None:
        """Learn from all of these points, and nothing else since the fit."""
        host = lambda tensor: tensor.to("cpu", torch.float64)  # noqa: E731
        prior, draws = self._fitted.to(host), self.draws.cpu()
        how = {"predictive": self.settings["predictive"], "draws": draws}
        with as_function():
            after, reach, by, unseen = learn(points, prior, self.likelihood, drift=drift, **how)
            before = figures_of(points, prior, self.likelihood, **how)
            now = figures_of(unseen, replace(after, mean=None), self.likelihood, **how)
        assert after.mean is not None
        assert after.precision is not None
        figures = {f"before/{name}": value for name, value in before.items()}
        figures |= {f"after/{name}": value for name, value in now.items()}
        learnt = Learnt(after.mean, after.precision, after.temperature, reach, by, points, drift is not None, figures)
        self._follow_points(learnt.to(lambda tensor: tensor.to(self.curvature)))
        learnt.tell()

    def _follow_points(self, learnt: Learnt | None) -> None:
        """Be what was learnt, and let the students be it, too."""
        self.learnt, self._taught, self.guaranteed, self.spent = learnt, True, None, None
        self._tell_students()

    def _tell_students(self) -> None:
        for student in self._students:
            student.follow(self.posterior)

    def _forget_training(self, loader: DataLoader, unpack: Unpack) -> Self:
        if self.settings["curvature"] == "sampled":
            raise ValueError(
                "the curvature was sampled, so what single training points gave to it is not known: fit with "
                "curvature='exact', num_curvature=None to forget some of them later."
            )
        change = self._curvature_of(loader, unpack)  # which moves the posterior to where the network is
        curvature = self.curvature - change.to(self.curvature)
        before, after = torch.linalg.eigvalsh(self.curvature)[-1], torch.linalg.eigvalsh(curvature)[0]
        if after < -1e-6 * before.abs():
            raise ValueError("these points were not among those that the posterior has seen, so it cannot forget them.")
        self.curvature, self.guaranteed, self.spent = curvature, None, None
        self._tell_students()
        return self

    def _curvature_of(self, loader: DataLoader, unpack: Unpack, *, probes: bool = False) -> Tensor:
        """Σ Ψᵀ Λ Ψ over the points of a loader, along the basis, and the probes, too, if so wanted."""
        points, top = self._all(loader, unpack), self.settings["top_outputs"]
        if not len(points):
            raise ValueError("the loader has no points: pass one with data.")
        seeds = torch.arange(len(points.numbers))
        with self._reading():
            linearization = self._here()
            tangents = self._tangents if probes else self.basis
            batches = tqdm(points.batches(points.numbers, self.device), desc="ELLA curvature", unit="batch")
            return curvature(*(linearization, batches, tangents, self.likelihood, len(points)), seeds=seeds, top=top)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Go through data, alone, with random numbers that are nobody else's."""
        with self._lock, seeded(self.settings["seed"]), as_function():
            yield

    @staticmethod
    def _all(loader: Any, unpack: Unpack) -> Points:
        """Every point of a loader.

        Raises:
            ValueError: if not all of them can be held.
        """
        points = points_of(loader, unpack, MAX_HELD)
        if len(points.numbers) < len(points):
            raise ValueError(
                f"the loader has more than {MAX_HELD} points, but can be read once only: pass a part of it."
            )
        return points

    def _through(self, forward: Forward) -> Linearization:
        """The network seen through another function; the last one is kept."""
        here = self._here()
        if self._view is None or self._view[0] is not forward:
            ours = here.network.view.tensors
            self._view = forward, self._linearized(forward, lambda n, value: value.to(ours[n]) if n in ours else value)
        return self._view[1]

    def _here(self) -> Linearization:
        """The network, with the weights that the posterior is of, where it is now; and the posterior with it."""
        self._check_weights()
        self._follow()
        return self._linearization

    def _follow(self) -> None:
        """Move the posterior, and the view, to where the network is now; its type is the predictor's own."""
        device = self.device
        if self._linearization.device != device:
            types = {name: value.dtype for name, value in self._linearization.network.view.tensors.items()}
            self._cast(lambda name, value: value.to(device, types.get(name, value.dtype)))
        if self.curvature.device != device:
            self._map(lambda tensor: tensor.to(device))

    def _cast(self, cast: Cast) -> None:
        """Look at the network through a view with other tensors."""
        self._linearization = self._linearized(self.forward_function, cast)
        self._view = None

    def _linearized(self, forward: Forward, cast: Cast = lambda _, value: value) -> Linearization:
        made = linearize(self.model, forward, self.settings, self._tangents, cast)
        made.layerwise.quiet = self._quiet
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kind = fn(self.draws).dtype
        if kind not in (torch.float32, torch.float64):
            raise ValueError(
                f"a predictor works in float32 or float64, not in {kind}: fit with precision='bf16' instead."
            )
        super()._apply(fn, recurse)
        with self._lock:
            self._map(fn)
            self._cast(lambda _, value: fn(value))
        return self

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._tangents = {name: fn(tangents) for name, tangents in self._tangents.items()}
        for name in (*_PARTS, "draws"):
            setattr(self, name, fn(getattr(self, name)))
        self.learnt = None if self.learnt is None else self.learnt.to(fn)
        if self.familiarity is not None:
            self.familiarity._apply(lambda tensor: tensor.to(fn(tensor).device))


# What the names of their tensors begin with in a file.
_LEARNT, _FAMILIAR, _GUARANTEE, _SPENT = "learnt.", "familiarity.", "guarantee.", "spent"
_PARTS = ("eigenvalues", "curvature", "mean", *SCALES)


class SampledFunctions:
    """S networks drawn from a posterior: call it for all of them at once, or index it for one.

    Args:
        predictor: whose posterior they are from.
        draws: (S, K + m) standard normal numbers, the coordinates of each.
    """

    def __init__(self, predictor: ELLAPredictor, draws: Tensor):
        self.predictor, self.draws = predictor, draws

    def __call__(self, inputs: Inputs) -> Tensor:
        """Logits (S, B, C), divided by the temperature: the softmax of each is what that network would say."""
        logits, features = self.predictor.features(inputs)
        with as_function():
            posterior = self.predictor.posterior
            gaussian = posterior.outputs(logits, features, self.draws.to(features))
            tempered = self.predictor.likelihood.tempered(gaussian, posterior.temperature.to(logits))
            return shaped(tempered.samples(), self.predictor.axis, 2)

    def __getitem__(self, index: int) -> Callable[[Inputs], Tensor]:
        """One of them, a function from inputs to logits (B, C)."""
        draw = self.draws[index].unsqueeze(0)
        return lambda inputs: SampledFunctions(self.predictor, draw)(inputs)[0]

    def __len__(self) -> int:
        return len(self.draws)


def _shared(read: Callable[[], Points], world: World) -> Points:
    """Points of a loader that are the same for all processes.

    Raises:
        ValueError: if they are not.
    """
    with world.together("a look at the loader"):
        points = read()
        if world.size > 1 and not points.shareable:
            raise ValueError(
                "each of several processes would read other points from such a loader: pass a DataLoader of a "
                "map-style dataset."
            )
    world.check_same(points.digest() if world.size > 1 else "", "points: pass a loader without a sampler for each")
    return points


def linearize(
    model: nn.Module,
    forward: Forward,
    settings: Mapping[str, Any],
    parameters: Collection[str] | None = None,
    cast: Cast = lambda _, value: value,
) -> Linearization:
    """Linearise `model` as `settings` say, over the named parameters or those that require gradients."""
    names = ("engine", "precision", "samples_per_chunk", "tangents_per_chunk", "memory_budget", "channels")
    return Linearization(model, forward, names=parameters, cast=cast, **{name: settings[name] for name in names})


def _check_shapes(shapes: artefact.Shapes, model: nn.Module, settings: Mapping[str, Any], path: Any) -> None:
    """Raise a ValueError unless the tensors of a file are those of a posterior of this network."""
    rank = next(iter(shapes.get("eigenvalues", ("", ()))[1]), 0)
    expected: dict[str, tuple[int, ...]] = {"eigenvalues": (rank,), "curvature": (rank, rank)}
    expected |= dict.fromkeys(SCALES, ()) | {"mean": (rank,)}
    expected |= {f"basis.{name}": (rank, *parameter.shape) for name, parameter in model.named_parameters()}
    probes = settings["residual"] if isinstance(settings["residual"], int) else MAX_DRAWN
    types = {name: ("F32", "F64") if name in _PARTS else ("F32", "F64", "BF16") for name in expected}
    learnt = _learnt_shapes(shapes, rank, rank + probes)
    expected |= learnt
    types |= {name: (shapes[name][0],) for name in learnt if name in shapes}  # that of the points
    wrong = [n for n, (kind, shape) in shapes.items() if expected.get(n) != shape or kind not in types[n]]
    complete = shapes.keys() > {*_PARTS, *learnt} and rank > 0
    if wrong or not complete or settings["num_samples"] * (rank + probes) > MAX_DRAWN:
        raise ValueError(f"the tensors in {path} are not those of a posterior of this network ({wrong}): fit again.")


def _learnt_shapes(shapes: artefact.Shapes, rank: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Of the tensors of what was learnt, if there are any: n rows of C outputs, of which the targets have any shape."""
    if not any(name.startswith(_LEARNT) for name in shapes):
        return {}
    rows = shapes.get(f"{_LEARNT}logits", ("", (0, 0)))[1]
    targets = shapes.get(f"{_LEARNT}targets", ("", ()))[1]
    expected = {"mean": (rank,), "precision": (rank, rank), "temperature": (), "logits": rows}
    expected |= {"features": (*rows, columns), "targets": (*rows[:1], *targets[1:])}
    expected |= dict.fromkeys(("weights", "samples"), rows[:1])
    return {_LEARNT + name: shape for name, shape in expected.items()}


def _owned(points: Observations) -> Observations:
    """Rows that may be saved for a backward pass, whatever mode they were made in."""
    return Observations(*(constant(part) for part in points))
