"""Adapters, one file per family."""

from ..architecture import Architecture
from .cohere import Cohere, Cohere2
from .gemma import Gemma2, Gemma3, VaultGemma
from .gpt2 import GPT2
from .gpt_oss import GptOss
from .gptj import GPTJ
from .gptneox import GPTNeoX
from .granite import Granite, GraniteMoE
from .llama import Llama
from .olmo import OLMo, OLMo2, OLMoE
from .phi import Phi
from .phi3 import Phi3
from .qwen3 import Qwen3
from .smollm3 import SmolLM3

ADAPTERS: list[type[Architecture]] = [
    GPT2,
    GPTJ,
    GPTNeoX,
    Llama,
    Qwen3,
    Phi,
    Phi3,
    Gemma2,
    Gemma3,
    VaultGemma,
    OLMo,
    OLMo2,
    OLMoE,
    GptOss,
    SmolLM3,
    Granite,
    GraniteMoE,
    Cohere,
    Cohere2,
]
