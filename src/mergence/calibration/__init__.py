"""Choosing where tokens leave, from a few hundred images without labels."""

from mergence.calibration.sensitivity import Curves
from mergence.calibration.tuning import Calibration, Found, calibrate

__all__ = ["Calibration", "Curves", "Found", "calibrate"]
