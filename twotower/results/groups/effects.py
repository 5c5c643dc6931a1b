"""Groups of effects: what the answer loses or gains when heads change."""

from __future__ import annotations

from ..variable import PROMPT, PROMPT_HEAD, Variable

EFFECTS: dict[str, dict[str, Variable]] = {
    "effects": {
        "margin_drop": Variable(
            PROMPT_HEAD,
            "float",
            "drop of the margin",
            "margin of the clean run minus margin with the head knocked out",
            title="effect on margin",
        ),
        "logprob_drop": Variable(
            (*PROMPT_HEAD, "label"),
            "float",
            "drop of the label's log-probability",
            "clean minus knocked out, over the whole vocabulary",
            "nat",
            required=False,
        ),
    },
    "group_effects": {
        "margin_drop": Variable(
            ("prompt", "group"),
            "float",
            "drop of the margin",
            "margin of the clean run minus margin with the group's heads changed together",
        ),
        "logprob_drop": Variable(
            ("prompt", "group", "label"),
            "float",
            "drop of the label's log-probability",
            "clean minus changed, over the whole vocabulary",
            "nat",
            required=False,
        ),
        "n_heads": Variable(("group",), "int", "heads of the group", "number of heads changed"),
    },
    "pair_effects": {
        "margin_drop": Variable(
            (*PROMPT_HEAD, "other_layer", "other_head"),
            "float",
            "drop of the margin",
            "margin of the clean run minus margin with both heads changed; a head's pair with "
            "itself is the head alone",
        ),
    },
    "greedy": {
        "chosen_layer": Variable(("step",), "int", "layer of the head chosen", "from 0"),
        "chosen_head": Variable(("step",), "int", "head chosen", "number in its layer, from 0"),
        "margin_drop": Variable(
            ("prompt", "step"),
            "float",
            "drop of the margin",
            "margin of the clean run minus margin with the heads of all steps so far changed",
        ),
    },
    "tracing": {
        "margin_gain": Variable(
            PROMPT_HEAD,
            "float",
            "gain of the margin",
            "margin of the clean prompt's answer in the corrupted run with the head's clean "
            "output put in, minus that of the corrupted run",
            title="restored margin",
        ),
        "margin_clean": Variable(
            PROMPT, "float", "margin of the clean run", "towards the clean prompt's answer"
        ),
        "margin_corrupted": Variable(
            PROMPT, "float", "margin of the corrupted run", "towards the clean prompt's answer"
        ),
    },
    "trace": {
        "logprob": Variable(
            ("prompt", "token"),
            "float",
            "log-probability of the token",
            "given the prompt and the completion's earlier tokens (teacher-forced)",
            "nat",
        ),
        "logprob_drop": Variable(
            (*PROMPT_HEAD, "token"),
            "float",
            "drop of the token's log-probability",
            "clean minus head changed, over the whole vocabulary",
            "nat",
        ),
        "answer_logprob": Variable(
            PROMPT,
            "float",
            "log-probability of the answer",
            "sum over the tokens of the completion's span `answer`",
            "nat",
            required=False,
        ),
        "answer_drop": Variable(
            PROMPT_HEAD,
            "float",
            "drop of the answer's log-probability",
            "sum over the tokens of the completion's span `answer`; of all of them, also those "
            "that are not stored",
            "nat",
            required=False,
            title="effect on the answer",
        ),
    },
    "function_vector": {
        "vector": Variable(
            ("feature",),
            "float",
            "function vector",
            "sum over heads of the mean over prompts of what the head adds to the residual stream "
            "at the last position (Todd et al. 2024, arXiv:2310.15213); a norm after attention has "
            "the statistic of its position",
        ),
        "head_vector": Variable(
            ("chosen", "feature"),
            "float",
            "mean output of the head",
            "its part of the function vector",
        ),
    },
    "vector_effects": {
        "logprob_gain": Variable(
            ("prompt", "layer"),
            "float",
            "gain of the right answer's log-probability",
            "with the vector added to the stream entering the layer, minus without",
            "nat",
        ),
        "margin": Variable(
            ("prompt", "layer"),
            "float",
            "margin",
            "as in predictions, with the vector added to the stream entering the layer",
        ),
        "correct": Variable(
            ("prompt", "layer"),
            "bool",
            "right among the labels",
            "as in predictions, with the vector added",
        ),
        "top1_correct": Variable(
            ("prompt", "layer"),
            "bool",
            "right over the vocabulary",
            "as in predictions, with the vector added",
        ),
    },
}
