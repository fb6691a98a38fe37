"""Calibration of what `Options` and `Preference` answer, on real models and real data."""
