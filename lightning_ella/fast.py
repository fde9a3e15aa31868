"""The fast predictor: one forward pass of the user's network, and a student of the exact engine on top."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .activations import Place, Recorder
from .batches import Inputs, as_tree, call, plain
from .head import Head
from .likelihoods import LIKELIHOODS
from .linearize import Forward, Network, as_function, check_finite
from .posterior import Posterior
from .student import Student, Translation

log = logging.getLogger(__name__)

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
            recorder = self._here()
            own = tree_map(_constant, plain(as_tree(inputs), self.device))
            recorder.network.settle(own)
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

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.model.parameters()), self.temperature.device)

    def _here(self) -> Recorder:
        """The network where it is now, and the student with it."""
        if self.temperature.device != self.device:
            self.to(self.device)
        if self._recorder is None or self._recorder.network.device != self.device:
            names = [name for name, parameter in self.model.named_parameters() if parameter.is_floating_point()]
            self._recorder = Recorder(Network(self.model, self.forward_function, names), self.places)
        return self._recorder


def _constant(leaf: Any) -> Any:
    """A tensor without a graph that may be saved for a backward pass."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if leaf.is_inference() else leaf.detach()
