"""The methods, one file each. Importing this package registers them under their names."""

from visiontrim.methods.adsc import ADSC
from visiontrim.methods.controls import NoTrim, Random, Uniform
from visiontrim.methods.dart import DART
from visiontrim.methods.fastv import FastV
from visiontrim.methods.ficoco import FiCoCoL
from visiontrim.methods.parvts import ParVTS
from visiontrim.methods.pyramiddrop import PyramidDrop
from visiontrim.methods.sparsevlm import SparseVLM
from visiontrim.methods.v2drop import V2Drop
from visiontrim.methods.visiontrim import VisionTrim

__all__ = [
    "ADSC",
    "DART",
    "FastV",
    "FiCoCoL",
    "NoTrim",
    "ParVTS",
    "PyramidDrop",
    "Random",
    "SparseVLM",
    "Uniform",
    "V2Drop",
    "VisionTrim",
]
