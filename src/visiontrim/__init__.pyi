# The public names and where they live: the one list, which __init__.py reads.

from visiontrim.core.errors import TrimError as TrimError
from visiontrim.core.method import DecoderLayer as DecoderLayer
from visiontrim.core.method import Decoding as Decoding
from visiontrim.core.method import EncoderLayer as EncoderLayer
from visiontrim.core.method import Layers as Layers
from visiontrim.core.method import Method as Method
from visiontrim.core.method import Plan as Plan
from visiontrim.core.method import Step as Step
from visiontrim.core.method import VisionOutput as VisionOutput
from visiontrim.core.registry import list_methods as list_methods
from visiontrim.core.registry import load_method as load_method
from visiontrim.core.registry import register as register
from visiontrim.core.signals import DecoderSignals as DecoderSignals
from visiontrim.core.signals import EncoderSignals as EncoderSignals
from visiontrim.core.signals import Sides as Sides
from visiontrim.core.signals import Text as Text
from visiontrim.core.signals import TextSignals as TextSignals
from visiontrim.core.view import Glance as Glance
from visiontrim.core.view import Keep as Keep
from visiontrim.core.view import View as View
from visiontrim.methods import (
    ADSC as ADSC,
)
from visiontrim.methods import (
    AOT as AOT,
)
from visiontrim.methods import (
    DART as DART,
)
from visiontrim.methods import (
    EVS as EVS,
)
from visiontrim.methods import (
    LUVC as LUVC,
)
from visiontrim.methods import (
    MMR as MMR,
)
from visiontrim.methods import (
    PPE as PPE,
)
from visiontrim.methods import (
    SCOPE as SCOPE,
)
from visiontrim.methods import (
    VCAST as VCAST,
)
from visiontrim.methods import (
    ApET as ApET,
)
from visiontrim.methods import (
    AutoPrune as AutoPrune,
)
from visiontrim.methods import (
    AvgPool as AvgPool,
)
from visiontrim.methods import (
    CDPruner as CDPruner,
)
from visiontrim.methods import (
    CrossGET as CrossGET,
)
from visiontrim.methods import (
    DivPrune as DivPrune,
)
from visiontrim.methods import (
    DyCoke as DyCoke,
)
from visiontrim.methods import (
    DyMU as DyMU,
)
from visiontrim.methods import (
    Fade as Fade,
)
from visiontrim.methods import (
    FasterVLM as FasterVLM,
)
from visiontrim.methods import (
    FastV as FastV,
)
from visiontrim.methods import (
    FastVID as FastVID,
)
from visiontrim.methods import (
    FiCoCoL as FiCoCoL,
)
from visiontrim.methods import (
    FiCoCoV as FiCoCoV,
)
from visiontrim.methods import (
    FlashVID as FlashVID,
)
from visiontrim.methods import (
    HiPrune as HiPrune,
)
from visiontrim.methods import (
    HoliTom as HoliTom,
)
from visiontrim.methods import (
    HoliTomInner as HoliTomInner,
)
from visiontrim.methods import (
    HoloV as HoloV,
)
from visiontrim.methods import (
    IVCPrune as IVCPrune,
)
from visiontrim.methods import (
    LiteLVLM as LiteLVLM,
)
from visiontrim.methods import (
    MMTok as MMTok,
)
from visiontrim.methods import (
    MustDrop as MustDrop,
)
from visiontrim.methods import (
    NoTrim as NoTrim,
)
from visiontrim.methods import (
    Nuwa as Nuwa,
)
from visiontrim.methods import (
    ParVTS as ParVTS,
)
from visiontrim.methods import (
    PixelPrune as PixelPrune,
)
from visiontrim.methods import (
    PruMerge as PruMerge,
)
from visiontrim.methods import (
    PruMergePlus as PruMergePlus,
)
from visiontrim.methods import (
    PruneSID as PruneSID,
)
from visiontrim.methods import (
    PyramidDrop as PyramidDrop,
)
from visiontrim.methods import (
    Random as Random,
)
from visiontrim.methods import (
    SparseVLM as SparseVLM,
)
from visiontrim.methods import (
    STGridPool as STGridPool,
)
from visiontrim.methods import (
    ToMe as ToMe,
)
from visiontrim.methods import (
    TransPrune as TransPrune,
)
from visiontrim.methods import (
    Turbo as Turbo,
)
from visiontrim.methods import (
    Uniform as Uniform,
)
from visiontrim.methods import (
    V2Drop as V2Drop,
)
from visiontrim.methods import (
    VidCom2 as VidCom2,
)
from visiontrim.methods import (
    VisionTrim as VisionTrim,
)
from visiontrim.methods import (
    VisionZip as VisionZip,
)
from visiontrim.methods import (
    VisPruner as VisPruner,
)
from visiontrim.methods import (
    VLMPruner as VLMPruner,
)
from visiontrim.methods import (
    VScan as VScan,
)
from visiontrim.methods import (
    ZOOPrune as ZOOPrune,
)
from visiontrim.models import TextTower as TextTower
from visiontrim.report import Report as Report
from visiontrim.run import Run as Run
from visiontrim.run import current as current
from visiontrim.run import remove as remove
from visiontrim.run import trim as trim

__version__: str
