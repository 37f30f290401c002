"""varlik: exact class likelihoods from visual autoregressive (VAR) models, and classification by them.

import varlik
classifier = varlik.load("fashion-mnist")
classifier.classify(["shoe.png"]).names
"""

from varlik._version import __version__
from varlik.calibration import Calibration, calibrate
from varlik.cascade import AVARC_PLUS, FAST, VARC, Cascade, Race, Screen, Smooth, Stage
from varlik.classifier import VARClassifier, load
from varlik.drop_in import accelerate
from varlik.models.checkpoints import CheckpointError
from varlik.models.presets import list_models
from varlik.prediction import Prediction
from varlik.scoring.options import EngineOptions
from varlik.tokens import TokenMaps

__all__ = [
    "AVARC_PLUS",
    "FAST",
    "VARC",
    "Calibration",
    "Cascade",
    "CheckpointError",
    "EngineOptions",
    "Prediction",
    "Race",
    "Screen",
    "Smooth",
    "Stage",
    "TokenMaps",
    "VARClassifier",
    "__version__",
    "accelerate",
    "calibrate",
    "list_models",
    "load",
]
