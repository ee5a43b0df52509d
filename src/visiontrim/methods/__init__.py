"""The methods, one file each. Importing this package registers them under their names."""

from visiontrim.methods.adsc import ADSC
from visiontrim.methods.avgpool import AvgPool
from visiontrim.methods.cdpruner import CDPruner
from visiontrim.methods.controls import NoTrim, Random, Uniform
from visiontrim.methods.dart import DART
from visiontrim.methods.divprune import DivPrune
from visiontrim.methods.fastervlm import FasterVLM
from visiontrim.methods.fastv import FastV
from visiontrim.methods.ficoco import FiCoCoL
from visiontrim.methods.hiprune import HiPrune
from visiontrim.methods.mmtok import MMTok
from visiontrim.methods.parvts import ParVTS
from visiontrim.methods.prumerge import PruMerge, PruMergePlus
from visiontrim.methods.prunesid import PruneSID
from visiontrim.methods.pyramiddrop import PyramidDrop
from visiontrim.methods.sparsevlm import SparseVLM
from visiontrim.methods.v2drop import V2Drop
from visiontrim.methods.visiontrim import VisionTrim
from visiontrim.methods.visionzip import VisionZip
from visiontrim.methods.vispruner import VisPruner
from visiontrim.methods.vscan import VScan

__all__ = [
    "ADSC",
    "DART",
    "AvgPool",
    "CDPruner",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "FiCoCoL",
    "HiPrune",
    "MMTok",
    "NoTrim",
    "ParVTS",
    "PruMerge",
    "PruMergePlus",
    "PruneSID",
    "PyramidDrop",
    "Random",
    "SparseVLM",
    "Uniform",
    "V2Drop",
    "VScan",
    "VisPruner",
    "VisionTrim",
    "VisionZip",
]
