"""Causal-LM types of transformers that are not supported, each with the reason."""

from __future__ import annotations

ENCODER = "it is an encoder: its positions see later ones"
WITH_ENCODER = "it is the decoder of an encoder-decoder, with norms after the residual sum"
RECURRENT = "it has no heads that attend by softmax"

REFUSED: dict[str, str] = {}
"""Reasons by `config.model_type`."""
