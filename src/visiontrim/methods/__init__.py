"""The methods, one file each. Importing this package registers them under their names."""

from visiontrim.methods.controls import NoTrim, Random, Uniform
from visiontrim.methods.fastv import FastV
from visiontrim.methods.visiontrim import VisionTrim

__all__ = ["FastV", "NoTrim", "Random", "Uniform", "VisionTrim"]
