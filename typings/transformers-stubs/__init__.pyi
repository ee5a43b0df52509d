# What we import from the top of transformers, for pyright alone, and nothing else of that package.
#
# Its own __init__ imports every model there is: 2,600 files, a third of pyright's time. A name that is missing here is
# an "unknown import symbol": add its line.

from . import cache_utils as cache_utils
from . import masking_utils as masking_utils
from .configuration_utils import PreTrainedConfig as PreTrainedConfig
from .feature_extraction_utils import BatchFeature as BatchFeature
from .generation.logits_process import LogitsProcessor as LogitsProcessor
from .generation.logits_process import LogitsProcessorList as LogitsProcessorList
from .generation.stopping_criteria import StoppingCriteria as StoppingCriteria
from .generation.stopping_criteria import StoppingCriteriaList as StoppingCriteriaList
from .modeling_utils import PreTrainedModel as PreTrainedModel
from .models.auto.configuration_auto import AutoConfig as AutoConfig
from .models.auto.modeling_auto import AutoModelForImageTextToText as AutoModelForImageTextToText
from .models.auto.processing_auto import AutoProcessor as AutoProcessor
from .models.auto.tokenization_auto import AutoTokenizer as AutoTokenizer
from .models.clip.configuration_clip import CLIPConfig as CLIPConfig
from .models.clip.configuration_clip import CLIPTextConfig as CLIPTextConfig
from .models.clip.configuration_clip import CLIPVisionConfig as CLIPVisionConfig
from .models.clip.image_processing_clip import CLIPImageProcessor as CLIPImageProcessor
from .models.clip.modeling_clip import CLIPModel as CLIPModel
from .models.llama.configuration_llama import LlamaConfig as LlamaConfig
from .models.llama.modeling_llama import LlamaForCausalLM as LlamaForCausalLM
from .models.llava.configuration_llava import LlavaConfig as LlavaConfig
from .models.llava.modeling_llava import LlavaForConditionalGeneration as LlavaForConditionalGeneration
from .models.llava.processing_llava import LlavaProcessor as LlavaProcessor
from .models.paddleocr_vl.processing_paddleocr_vl import PaddleOCRVLProcessor as PaddleOCRVLProcessor
from .models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig as Qwen2_5_VLConfig
from .models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration as Qwen2_5_VLForConditionalGeneration,
)
from .models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Qwen2VLImageProcessorPil
from .processing_utils import ProcessorMixin as ProcessorMixin
from .tokenization_utils_base import PreTrainedTokenizerBase as PreTrainedTokenizerBase
from .tokenization_utils_tokenizers import PreTrainedTokenizerFast as PreTrainedTokenizerFast

__version__: str
