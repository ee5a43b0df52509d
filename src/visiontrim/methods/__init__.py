"""The methods, one file each. Importing this package registers them under their names."""

from visiontrim.methods.avgpool import AvgPool
from visiontrim.methods.cdpruner import CDPruner
from visiontrim.methods.controls import NoTrim, Random, Uniform
from visiontrim.methods.divprune import DivPrune
from visiontrim.methods.fastervlm import FasterVLM
from visiontrim.methods.hiprune import HiPrune
from visiontrim.methods.mmtok import MMTok
from visiontrim.methods.prumerge import PruMerge, PruMergePlus
from visiontrim.methods.prunesid import PruneSID
from visiontrim.methods.visiontrim import VisionTrim
from visiontrim.methods.visionzip import VisionZip
from visiontrim.methods.vispruner import VisPruner
from visiontrim.methods.vscan import VScan

__all__ = [
    "AvgPool",
    "CDPruner",
    "DivPrune",
    "FasterVLM",
    "HiPrune",
    "MMTok",
    "NoTrim",
    "PruMerge",
    "PruMergePlus",
    "PruneSID",
    "Random",
    "Uniform",
    "VScan",
    "VisPruner",
    "VisionTrim",
    "VisionZip",
]
