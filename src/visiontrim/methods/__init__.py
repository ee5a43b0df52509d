"""The methods, one file each. Importing this package registers them under their names."""

from visiontrim.methods.adsc import ADSC
from visiontrim.methods.aot import AOT
from visiontrim.methods.apet import ApET
from visiontrim.methods.autoprune import AutoPrune
from visiontrim.methods.avgpool import AvgPool
from visiontrim.methods.cdpruner import CDPruner
from visiontrim.methods.controls import Fade, NoTrim, Random, Uniform
from visiontrim.methods.crossget import CrossGET
from visiontrim.methods.dart import DART
from visiontrim.methods.divprune import DivPrune
from visiontrim.methods.dycoke import DyCoke
from visiontrim.methods.dymu import DyMU
from visiontrim.methods.evs import EVS
from visiontrim.methods.fastervlm import FasterVLM
from visiontrim.methods.fastv import FastV
from visiontrim.methods.fastvid import FastVID
from visiontrim.methods.ficoco import FiCoCoL
from visiontrim.methods.ficocov import FiCoCoV
from visiontrim.methods.flashvid import FlashVID
from visiontrim.methods.hiprune import HiPrune
from visiontrim.methods.holitom import HoliTom, HoliTomInner
from visiontrim.methods.holov import HoloV
from visiontrim.methods.ivcprune import IVCPrune
from visiontrim.methods.litelvlm import LiteLVLM
from visiontrim.methods.luvc import LUVC
from visiontrim.methods.mmr import MMR
from visiontrim.methods.mmtok import MMTok
from visiontrim.methods.mustdrop import MustDrop
from visiontrim.methods.nuwa import Nuwa
from visiontrim.methods.parvts import ParVTS
from visiontrim.methods.pixelprune import PixelPrune
from visiontrim.methods.ppe import PPE
from visiontrim.methods.prumerge import PruMerge, PruMergePlus
from visiontrim.methods.prunesid import PruneSID
from visiontrim.methods.pyramiddrop import PyramidDrop
from visiontrim.methods.scope import SCOPE
from visiontrim.methods.sparsevlm import SparseVLM
from visiontrim.methods.stgridpool import STGridPool
from visiontrim.methods.tome import ToMe
from visiontrim.methods.transprune import TransPrune
from visiontrim.methods.turbo import Turbo
from visiontrim.methods.v2drop import V2Drop
from visiontrim.methods.vcast import VCAST
from visiontrim.methods.vidcom2 import VidCom2
from visiontrim.methods.visiontrim import VisionTrim
from visiontrim.methods.visionzip import VisionZip
from visiontrim.methods.vispruner import VisPruner
from visiontrim.methods.vlmpruner import VLMPruner
from visiontrim.methods.vscan import VScan
from visiontrim.methods.zooprune import ZOOPrune

__all__ = [
    "ADSC",
    "AOT",
    "DART",
    "EVS",
    "LUVC",
    "MMR",
    "PPE",
    "SCOPE",
    "VCAST",
    "ApET",
    "AutoPrune",
    "AvgPool",
    "CDPruner",
    "CrossGET",
    "DivPrune",
    "DyCoke",
    "DyMU",
    "Fade",
    "FastV",
    "FastVID",
    "FasterVLM",
    "FiCoCoL",
    "FiCoCoV",
    "FlashVID",
    "HiPrune",
    "HoliTom",
    "HoliTomInner",
    "HoloV",
    "IVCPrune",
    "LiteLVLM",
    "MMTok",
    "MustDrop",
    "NoTrim",
    "Nuwa",
    "ParVTS",
    "PixelPrune",
    "PruMerge",
    "PruMergePlus",
    "PruneSID",
    "PyramidDrop",
    "Random",
    "STGridPool",
    "SparseVLM",
    "ToMe",
    "TransPrune",
    "Turbo",
    "Uniform",
    "V2Drop",
    "VLMPruner",
    "VScan",
    "VidCom2",
    "VisPruner",
    "VisionTrim",
    "VisionZip",
    "ZOOPrune",
]
