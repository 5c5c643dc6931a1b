"""Causal-LM types of transformers that are not supported, each with the reason."""

from __future__ import annotations

ENCODER = "it is an encoder: positions see later ones"
POST_NORM = "a norm follows the residual sum, so that there is no residual stream to read"
OF_ENCODER = "it is the decoder of an encoder-decoder, with cross-attention"
RECURRENT = "it has no heads that attend by softmax"
STREAMS = "it keeps several copies of the residual stream"
INDEXER = "an indexer selects the keys that a query may see"

BY_REASON: dict[str, str] = {
    ENCODER: "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert "
    "rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod",
    OF_ENCODER: "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart "
    "prophetnet trocr whisper t5 musicgen musicgen_decoder "
    "musicgen_melody musicgen_melody_decoder",
    POST_NORM: "openai-gpt git cpmant",
    RECURRENT: "mamba mamba2 falcon_mamba rwkv xlstm",
    INDEXER: "minimax_m3_vl_text deepseek_v32 glm_moe_dsa axk2 dots3_note_text",
    STREAMS: "deepseek_v4 hy_v4 qwen4_exp_text gemma3n_text",
    "it drafts tokens for another model, from that model's keys and values": "gemma4_assistant "
    "gemma4_unified_assistant",
    "it runs its layers several times": "hrm_text",
    "it consists of several transformers, over bytes and patches": "blt",
    "a convolution over positions acts inside queries and keys": "zaya inkling_text inkling2_text",
    "a nonlinear layer stands between the final norm and the unembedding": "modernbert-decoder",
    "a norm spans all heads' outputs, so that heads do not add up": "bitnet",
    "its heads are differences of two softmaxes": "diffllama",
    "it masks keys by the content of their values": "doge",
    "each token chooses experts for its heads' projections": "jetmoe",
    "its blocks have two attentions": "longcat_flash",
    "its residual stream is the output of a norm": "minimax",
    "only a Mamba layer reads what its heads write, and no residual stream": "zamba zamba2",
    "its order of positions is permuted, in two streams": "xlnet",
    "its keys are selected by hashing, and its residual stream is double": "reformer",
}

REFUSED = {kind: reason for reason, kinds in BY_REASON.items() for kind in kinds.split()}
"""Reasons by `config.model_type`."""
