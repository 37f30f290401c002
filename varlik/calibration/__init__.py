"""What screening, the race and posteriors need to know about a model, measured on images of it."""

from varlik.calibration.artefact import Calibration, Fingerprint
from varlik.calibration.conformal import Rule
from varlik.calibration.fit import calibrate

__all__ = ["Calibration", "Fingerprint", "Rule", "calibrate"]
