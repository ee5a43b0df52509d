"""Measuring what compression costs and saves."""

from visiontrim.measure.clock import Clock

__all__ = ["Clock"]
