"""Add one callback to a Lightning Trainer and the trained network knows how sure it is."""

import logging

from .callback import ELLACallback
from .fast import FastPredictor
from .fit import fit_ella
from .likelihoods import LIKELIHOODS, Likelihood
from .predictions import ClassPrediction, LabelPrediction, NormalPrediction, Prediction
from .predictor import ELLAPredictor
from .settings import Settings

__version__ = "0.1.0"
__all__ = [
    "LIKELIHOODS",
    "ClassPrediction",
    "ELLACallback",
    "ELLAPredictor",
    "FastPredictor",
    "LabelPrediction",
    "Likelihood",
    "NormalPrediction",
    "Prediction",
    "Settings",
    "fit_ella",
]

# What was chosen and why is worth reading, as Lightning's own lines are: shown unless the user configured logging.
_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)
if not logging.root.hasHandlers():
    _log.addHandler(logging.StreamHandler())
    _log.propagate = False
