"""Choosing where tokens leave, from a few hundred images without labels."""

from mergence.calibration.outcome import Calibration, Found
from mergence.calibration.sensitivity import Curves
from mergence.calibration.tuning import calibrate

__all__ = ["Calibration", "Curves", "Found", "calibrate"]
