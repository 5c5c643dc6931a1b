"""Groups of values of heads: attention, scores, label logits and kinds."""

from __future__ import annotations

from typing import Any

from ..variable import AUC, PAPER, PROMPT_HEAD, Variable, auc

_LOGIT = (
    "x W_U through the final norm (and a norm after attention, if there is one) with the last "
    "position's statistic, before any softcap; biases left out"
)
_QK_AUC = (
    "probability that a label position of the query's class has a larger QK score than one of "
    "another class, ties counting half; mean over prompts"
)
_QK_SIZE = (
    "mean QK score of label positions of the query's class less that of others; mean over prompts"
)
_OV_AUC = (
    "probability that a label position holding a label has a larger label logit, less the mean of "
    "the other labels', than one that does not; mean over labels and prompts"
)
_OV_SIZE = (
    "mean label logit, less the mean of the other labels', of positions that hold the label less "
    "that of others; mean over labels and prompts"
)
_UNSIGNED = {"format": ".3f"}
_ASKED = {"required": False}
_KIND_SCORES: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    (
        "previous_token",
        "previous-token score",
        "mean attention from a token to the one before it, in random sequences repeated once",
        "previous token",
        _UNSIGNED,
    ),
    (
        "duplicate_token",
        "duplicate-token score",
        "mean attention from a repeated token to its first occurrence, in such sequences",
        "duplicate token",
        _UNSIGNED,
    ),
    (
        "induction",
        "induction score",
        "mean attention from a repeated token to the token after its first occurrence (Olsson et "
        "al. 2022, arXiv:2209.11895, prefix matching)",
        "induction",
        _UNSIGNED,
    ),
    (
        "sink",
        "attention to the first token",
        "mean attention from repeated tokens to the first position (Xiao et al. 2023, "
        "arXiv:2309.17453)",
        "sink",
        _UNSIGNED,
    ),
    (
        "copying",
        "copying score",
        "share of random tokens that are among the 5 with the largest logit of the head's raw "
        "value-output vector at their position (after Wang et al. 2022, arXiv:2211.00593)",
        "copying",
        _UNSIGNED,
    ),
    (
        "suppression",
        "suppression score",
        "the same among the 5 with the smallest logit (after McDougall et al. 2023, "
        "arXiv:2310.04625)",
        "suppression",
        _UNSIGNED,
    ),
    (
        "function_vector",
        "function-vector effect",
        "gain of the right answer's log-probability in prompts with shuffled labels when the "
        "head's output at the last position becomes its mean over the prompts with their own "
        "labels (Todd et al. 2024, arXiv:2310.15213, average indirect effect)",
        "function vector",
        {**_ASKED, "units": "nat"},
    ),
    (
        "answer_logit",
        "logit written for the answer",
        "the right answer's label logit of the head's output, less the mean of the others'",
        "writes for the answer",
        _ASKED,
    ),
    (
        "answer_effect",
        "effect on the answer",
        "mean drop of the margin when the head is knocked out at the last position",
        "effect on the answer, mean",
        _ASKED,
    ),
    ("qk_auc", "QK AUC", _QK_AUC, "QK AUC", {**AUC, **_ASKED}),
    ("qk_size", "size of the QK difference", _QK_SIZE, "QK size", _ASKED),
    ("ov_auc", "OV AUC", _OV_AUC, "OV AUC", {**AUC, **_ASKED}),
    ("ov_size", "size of the OV difference", _OV_SIZE, "OV size", _ASKED),
)
"""Scores of kinds of heads: name, name in words, definition, title, and further settings."""

HEADS: dict[str, dict[str, Variable]] = {
    "shares": {
        "share": Variable(
            (*PROMPT_HEAD, "source"),
            "float",
            "share of attention",
            "mean over the positions that look (attribute `settings`) of the attention paid to "
            "each source; sources sum to 1",
        ),
    },
    "attribution": {
        "logprob_increase": Variable(
            (*PROMPT_HEAD, "label"),
            "float",
            "log-probability increase",
            f"log p(label given x_T^l + W_O^h z_T) - log p(label given x_T^l) ({PAPER}); the "
            "attribute `settings` says whether the final norm keeps the statistic of the last "
            "position's final residual stream (norm frozen) or takes the vector's (own)",
            "nat",
        ),
        "label_logit": Variable(
            (*PROMPT_HEAD, "label"),
            "float",
            "label logit of the head's output",
            f"W_O^h z_T: {_LOGIT}",
            title="label logit",
        ),
    },
    "qk": {
        "score": Variable(
            (*PROMPT_HEAD, "position"),
            "float",
            "QK score",
            "q_T . k_p times the model's scaling, rotary included; capped as in the model, with "
            "ALiBi relative to the last position",
        ),
        "score_content": Variable(
            (*PROMPT_HEAD, "position"),
            "float",
            "content part of the QK score",
            "rotary models: query and key rotated to distance 0; ALiBi left out; learned "
            "positions: less the direct path of the position embedding through the attention's "
            "norm. The position part is score - score_content",
            required=False,
        ),
        "score_content_mean": Variable(
            (*PROMPT_HEAD, "position"),
            "float",
            "content part of the QK score, at the usual distances",
            "rotary models: mean of the score over the distances of the prompt's label positions",
            required=False,
        ),
        "attention": Variable(
            (*PROMPT_HEAD, "position"),
            "float",
            "attention of the last position",
            "softmax of the masked scores",
        ),
    },
    "ov": {
        "label_logit": Variable(
            (*PROMPT_HEAD, "position", "label"),
            "float",
            "label logit of the raw value-output vector",
            f"W_O^h v_p: {_LOGIT}. Weighted: attention times this",
        ),
        "top_token": Variable(
            ("prompt", "chosen", "position"),
            "str",
            "most likely token of the raw value-output vector",
            f"largest over the vocabulary; {_LOGIT}",
            required=False,
        ),
    },
    "scores": {
        "qk_auc": Variable(
            ("layer", "head"),
            "float",
            "QK AUC",
            _QK_AUC,
            **auc("QK AUC"),
        ),
        "qk_auc_content": Variable(
            ("layer", "head"),
            "float",
            "QK AUC of the content part",
            "the same on score_content",
            required=False,
            **auc("QK AUC, content"),
        ),
        "ov_auc": Variable(
            ("layer", "head"),
            "float",
            "OV AUC",
            _OV_AUC,
            **auc("OV AUC"),
        ),
        "qk_size": Variable(
            ("layer", "head"),
            "float",
            "size of the QK difference",
            _QK_SIZE,
            required=False,
            title="QK size",
        ),
        "ov_size": Variable(
            ("layer", "head"),
            "float",
            "size of the OV difference",
            _OV_SIZE,
            required=False,
            title="OV size",
        ),
        "margin_drop": Variable(
            ("layer", "head"),
            "float",
            "mean drop of the margin",
            "mean of effects.margin_drop over prompts",
            required=False,
            title="effect on margin",
        ),
    },
    "kinds": {
        **{
            name: Variable(("layer", "head"), "float", long_name, reference, title=title, **more)
            for name, long_name, reference, title, more in _KIND_SCORES
        },
        **{
            f"{name}_error": Variable(
                ("layer", "head"),
                "float",
                f"error of the {long_name}",
                "half the width of its 95% interval over sequences or prompts (Student's t)",
                required=False,
            )
            for name, long_name, *_ in _KIND_SCORES
        },
        "kind": Variable(
            ("layer", "head"),
            "str",
            "kinds of the head",
            "names whose thresholds (attribute `settings`) the head reaches, separated by commas",
        ),
    },
}
