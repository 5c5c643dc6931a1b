"""Schema of every dataset: variables, dims, units and definitions.

`forms.py` checks it when a dataset is made, saved or opened.

Notation of Yu & Ananiadou (2024, arXiv 2402.02872): layer l, head h, position p, last position T.
x_p^l is the residual stream entering layer l, z the head's output before the output projection,
W_O^h the head's slice of the output projection, a the attention weights, v the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import SchemaError

SCHEMA_VERSION = 1
PAPER = "Yu & Ananiadou 2024, arXiv:2402.02872"

DIMS = (
    "prompt",
    "layer",
    "head",
    "position",
    "label",
    "chosen",
    "group",
    "other_layer",
    "other_head",
    "step",
    "source",
    "key_source",
    "target",
    "into",
    "token",
    "feature",
    "unit",
    "edge",
    "ranking",
    "size",
)
"""All dims; every dim of a dataset has a coordinate."""


@dataclass(frozen=True)
class Variable:
    """Description of a variable.

    Parameters
    ----------
    dims
        Its dims, in order.
    kind
        "float", "int", "bool" or "str".
    long_name
        Name in words.
    reference
        Definition and its source.
    units
        "1" if dimensionless, "nat" for natural logarithms of probabilities.
    required
        Whether a dataset of the group must have it.
    title
        Short name in tables and figures. A variable of heads, (layer, head) with or without
        prompts and labels, with a title is a column of the head table, `twotower heads`, head
        maps and reports.
    format
        Format specification of a number; with a sign if 0 is the centre.
    chance
        Value of a head without effect: the centre of the colour scale.
    """

    dims: tuple[str, ...]
    kind: str
    long_name: str
    reference: str
    units: str = "1"
    required: bool = True
    title: str = ""
    format: str = "+.3f"
    chance: float = 0.0

    @property
    def signed(self) -> bool:
        """Whether numbers are written with a sign."""
        return self.format.startswith("+")


_U, _E = ("unit",), ("edge",)
_P, _PL = ("prompt",), ("prompt", "label")
_PP = ("prompt", "position")
_HEADS = ("prompt", "layer", "head")
_LOGIT = (
    "x W_U through the final norm (and a norm after attention, if there is one) with the last "
    "position's statistic, before any softcap; biases left out"
)


_AUC: dict[str, Any] = {"format": ".3f", "chance": 0.5}


def _auc(title: str) -> dict[str, Any]:
    """Return the display settings of an AUC."""
    return {"title": title, **_AUC}


_UNSIGNED = {"format": ".3f"}
_ASKED = {"required": False}
_TOWERS = (
    (
        "qk_auc",
        "QK AUC",
        "probability that a label position of the query's class has a larger QK score than one of "
        "another class, in one prompt; from queries and keys",
    ),
    (
        "class_attention",
        "attention to the query's class",
        "sum of the attention to label positions of the query's class; from queries and keys",
    ),
    (
        "ov_auc",
        "OV AUC",
        "probability that a label position holding a label has a larger label logit, less the mean "
        "of the other labels', than one that does not, in one prompt; from values",
    ),
    (
        "written",
        "written margin",
        "right label's logit of the head's output, less the mean of the other labels'; final norm "
        "with the last position's statistic of the clean run",
    ),
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
    ("qk_auc", "QK AUC", _QK_AUC, "QK AUC", {**_AUC, **_ASKED}),
    ("qk_size", "size of the QK difference", _QK_SIZE, "QK size", _ASKED),
    ("ov_auc", "OV AUC", _OV_AUC, "OV AUC", {**_AUC, **_ASKED}),
    ("ov_size", "size of the OV difference", _OV_SIZE, "OV size", _ASKED),
)
"""Scores of kinds of heads: name, name in words, definition, title, and further settings."""

COORDINATES = {
    "gold": Variable(_P, "str", "right label", "text of the label that answers the query"),
    "query_class": Variable(_P, "str", "class of the query", "class of the query's text"),
    "role": Variable(
        _PP,
        "str",
        "role of the position",
        "pad, bos, text, separator, label, query, last, or a user's name of a span",
        required=False,
    ),
    "demonstration": Variable(
        _PP,
        "int",
        "number of the demonstration",
        "from 0; -1 outside demonstrations",
        required=False,
    ),
    "demonstration_class": Variable(
        _PP,
        "str",
        "class of the demonstration",
        "class of the demonstration's text",
        required=False,
    ),
    "label_text": Variable(
        _PP,
        "str",
        "label of the demonstration",
        "text of the demonstration's label",
        required=False,
    ),
    "answer_text": Variable(
        _PL, "str", "answer", "text of the answer, if answers differ by prompt", required=False
    ),
    "answer_token": Variable(
        _PL,
        "str",
        "first token of the answer",
        "its text, if answers differ by prompt",
        required=False,
    ),
    "answer_tokens": Variable(
        _PL,
        "int",
        "tokens of the answer",
        "their number, if answers have several",
        required=False,
    ),
    "token_text": Variable(
        ("prompt", "token"), "str", "token of the completion", "its text", required=False
    ),
    "token_number": Variable(
        ("prompt", "token"),
        "int",
        "number of the token",
        "in the completion, from 0; -1 after its end",
        required=False,
    ),
    "span": Variable(
        ("prompt", "token"), "str", "span of the token", "a user's name, or empty", required=False
    ),
    "measured": Variable(
        _P,
        "bool",
        "measured",
        "whether the prompt's unit is done; else values are missing",
        required=False,
    ),
    "finite": Variable(
        _P,
        "bool",
        "finite",
        "whether the prompt's logits at the last position are finite; else values are missing",
        required=False,
    ),
    "token_position": Variable(
        _PP,
        "int",
        "position in the prompt",
        "counted from the end, the last being 0; stored with keep='labels'",
        required=False,
    ),
}

GROUPS: dict[str, dict[str, Variable]] = {
    "prompts": {
        "token_id": Variable(_PP, "int", "token id", "-1 where padded"),
        "token": Variable(_PP, "str", "token", "the token's text"),
        "text": Variable(_P, "str", "query", "the query's text"),
    },
    "predictions": {
        "logit": Variable(
            _PL,
            "float",
            "label logit",
            "the model's own logit of the label; only of labels of one token",
            required=False,
        ),
        "logprob": Variable(
            _PL,
            "float",
            "label log-probability",
            "over the whole vocabulary; of several tokens the sum of their log-probabilities, each "
            "given the tokens before it, or as the attribute `scoring` says",
            "nat",
        ),
        "margin": Variable(
            _P,
            "float",
            "margin",
            "logit of the right label minus the largest logit among the other labels. Of labels of "
            "several tokens, the same of log-probabilities (for one token both are equal). Without "
            "other labels, the right one's log-probability",
        ),
        "correct": Variable(
            _P,
            "bool",
            "right among the labels",
            "the right label has the largest logit of all labels (or log-probability, as the "
            "margin). Without other labels, as top1_correct",
        ),
        "top_token": Variable(_P, "str", "most likely token", "over the whole vocabulary"),
        "top1_correct": Variable(
            _P,
            "bool",
            "right over the vocabulary",
            f"the most likely token is the right label ({PAPER}, accuracy). Of labels of several "
            "tokens: each token is the most likely one after those before it",
        ),
    },
    "effects": {
        "margin_drop": Variable(
            _HEADS,
            "float",
            "drop of the margin",
            "margin of the clean run minus margin with the head knocked out",
            title="effect on margin",
        ),
        "logprob_drop": Variable(
            (*_HEADS, "label"),
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
    "edges": {
        "margin_drop": Variable(
            ("prompt", "source", "target", "into"),
            "float",
            "drop of the margin",
            "margin of the clean run minus margin with the source's write taken out of what the "
            "target's queries (q), keys (k) or values (v) read; the target's output and all above "
            "it follow, everything else below it is as in the clean run. NaN where the source is "
            "not below what the target reads",
        ),
        "logprob_drop": Variable(
            ("prompt", "source", "target", "into", "label"),
            "float",
            "drop of the label's log-probability",
            "clean minus changed, over the whole vocabulary",
            "nat",
            required=False,
        ),
    },
    "towers": {
        **{
            name: Variable(("prompt", "target"), "float", words, meaning)
            for name, words, meaning in _TOWERS
        },
        **{
            f"{name}_drop": Variable(
                ("prompt", "source", "target", "into"),
                "float",
                f"drop of the {words}",
                f"clean minus changed: {meaning}; the source's write taken out of what the "
                "target's queries (q), keys (k) or values (v) read",
            )
            for name, words, meaning in _TOWERS
        },
    },
    "score_parts": {
        "score": Variable(
            ("prompt", "chosen", "position"),
            "float",
            "QK score",
            "sum of all parts: q.k times the scaling, before softcap and position biases",
        ),
        **{
            f"{tower}_part{suffix}": Variable(
                ("prompt", "chosen", "source", "position"),
                "float",
                f"part of the score by what the {tower} tower reads{more}",
                f"the part of the {tower} that is linear in the source's write, times the whole "
                f"{other}{more}; norms keep the statistics of the clean run",
            )
            for tower, other in (("query", "key"), ("key", "query"))
            for suffix, more in (("", ""), ("_content", ", at distance 0"))
        },
        "score_part": Variable(
            ("prompt", "chosen", "source", "key_source", "position"),
            "float",
            "part of the score",
            "part of the query (source) times part of the key (key_source)",
            required=False,
        ),
    },
    "margin_parts": {
        "margin_part": Variable(
            ("prompt", "chosen", "source", "position"),
            "float",
            "part of the written margin",
            "right label's logit, less the mean of the others', of attention times the part of "
            "the value that is linear in the source's write at the position; norms keep the "
            "statistics of the clean run",
        ),
        "written": Variable(
            ("prompt", "chosen"),
            "float",
            "written margin",
            "right label's logit of the head's output, less the mean of the others'",
        ),
    },
    "circuit": {
        "effect": Variable(
            ("prompt", "edge"),
            "float",
            "effect of the edge",
            "drop of the margin, as `edges`; of edges into the answer the written margin: the "
            "right label's logit of the head's output, less the mean of the others'",
        ),
        "source_name": Variable(_E, "str", "source", "head, MLP or embedding"),
        "source_at": Variable(_E, "str", "where the source acts", "positions"),
        "target_name": Variable(_E, "str", "target", "head, or the answer"),
        "target_at": Variable(_E, "str", "where the target acts", "positions"),
        "tower": Variable(
            _E, "str", "tower", "the target's queries (q), keys (k) or values (v), or the answer"
        ),
        "mean_effect": Variable(_E, "float", "mean effect", "mean over prompts"),
        "low": Variable(_E, "float", "low end", "of the 95% bootstrap interval over prompts"),
        "high": Variable(_E, "float", "high end", "of the 95% bootstrap interval over prompts"),
        "chance": Variable(
            _E,
            "float",
            "chance",
            "mean absolute effect that 95% of equally many random edges of the step do not reach",
        ),
    },
    "faithfulness": {
        "margin": Variable(
            ("prompt", "ranking", "size"),
            "float",
            "margin",
            "margin if only the first heads of the ranking keep their outputs at all positions",
        ),
        "margin_clean": Variable(_P, "float", "clean margin", "with all heads"),
        "margin_without": Variable(_P, "float", "margin without heads", "no head keeps its output"),
        "kept": Variable(
            ("ranking", "size"),
            "float",
            "share kept",
            "share of the mean margin between that without heads and the clean one",
        ),
        "area": Variable(
            ("ranking",), "float", "area", "mean of the share kept over the logarithm of the size"
        ),
    },
    "pair_effects": {
        "margin_drop": Variable(
            (*_HEADS, "other_layer", "other_head"),
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
            _HEADS,
            "float",
            "gain of the margin",
            "margin of the clean prompt's answer in the corrupted run with the head's clean "
            "output put in, minus that of the corrupted run",
            title="restored margin",
        ),
        "margin_clean": Variable(
            _P, "float", "margin of the clean run", "towards the clean prompt's answer"
        ),
        "margin_corrupted": Variable(
            _P, "float", "margin of the corrupted run", "towards the clean prompt's answer"
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
            (*_HEADS, "token"),
            "float",
            "drop of the token's log-probability",
            "clean minus head changed, over the whole vocabulary",
            "nat",
        ),
        "answer_logprob": Variable(
            _P,
            "float",
            "log-probability of the answer",
            "sum over the tokens of the completion's span `answer`",
            "nat",
            required=False,
        ),
        "answer_drop": Variable(
            _HEADS,
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
    "shares": {
        "share": Variable(
            (*_HEADS, "source"),
            "float",
            "share of attention",
            "mean over the positions that look (attribute `settings`) of the attention paid to "
            "each source; sources sum to 1",
        ),
    },
    "attribution": {
        "logprob_increase": Variable(
            (*_HEADS, "label"),
            "float",
            "log-probability increase",
            f"log p(label given x_T^l + W_O^h z_T) - log p(label given x_T^l) ({PAPER}); the "
            "attribute `settings` says whether the final norm keeps the statistic of the last "
            "position's final residual stream (norm frozen) or takes the vector's (own)",
            "nat",
        ),
        "label_logit": Variable(
            (*_HEADS, "label"),
            "float",
            "label logit of the head's output",
            f"W_O^h z_T: {_LOGIT}",
            title="label logit",
        ),
    },
    "qk": {
        "score": Variable(
            (*_HEADS, "position"),
            "float",
            "QK score",
            "q_T . k_p times the model's scaling, rotary included; capped as in the model, with "
            "ALiBi relative to the last position",
        ),
        "score_content": Variable(
            (*_HEADS, "position"),
            "float",
            "content part of the QK score",
            "rotary models: query and key rotated to distance 0; ALiBi left out; learned "
            "positions: less the direct path of the position embedding "
            "through the attention's norm. The position part is score - "
            "score_content",
            required=False,
        ),
        "score_content_mean": Variable(
            (*_HEADS, "position"),
            "float",
            "content part of the QK score, at the usual distances",
            "rotary models: mean of the score over the distances of the prompt's label positions",
            required=False,
        ),
        "attention": Variable(
            (*_HEADS, "position"),
            "float",
            "attention of the last position",
            "softmax of the masked scores",
        ),
    },
    "ov": {
        "label_logit": Variable(
            (*_HEADS, "position", "label"),
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
    "bias": {
        "logit_bias": Variable(
            _P,
            "float",
            "logit bias",
            "logit of the favoured label less the mean of the others'; its mean over prompts with "
            f"balanced right answers is the bias (after {PAPER})",
        ),
        "count_bias": Variable(
            _P,
            "float",
            "count bias",
            "1 where the favoured label has the largest logit of all labels, else 0, less 1 over "
            f"the number of labels; its mean over such prompts is the bias (after {PAPER})",
        ),
        "favoured": Variable(
            _P,
            "str",
            "favoured label",
            "majority-label bias: the most frequent label of the demonstrations; recency bias: "
            "the label of the nearest block of them",
        ),
    },
    "residual": {
        "residual": Variable(
            ("prompt", "layer", "position", "feature"),
            "float",
            "residual stream",
            "x_p^l, what enters the layer",
        ),
    },
    "units": {
        "part": Variable(_U, "str", "part of the run", "a model, a task and a seed; may be empty"),
        "start": Variable(_U, "int", "first prompt", "number of the unit's first prompt"),
        "stop": Variable(_U, "int", "end of the prompts", "number after the unit's last prompt"),
        "state": Variable(_U, "str", "state", "done, failed, or empty where it is not measured"),
        "seconds": Variable(_U, "float", "time taken", "wall time of measuring and writing", "s"),
        "finished": Variable(_U, "float", "time of the end", "since the Unix epoch", "s"),
        "worker": Variable(_U, "str", "worker", "host and process that measured it"),
        "error": Variable(_U, "str", "error", "the last one, of a unit that failed"),
        "not_finite": Variable(
            _U,
            "str",
            "not finite",
            "prompts of the unit whose logits are not finite, and by group the number of single "
            "values that are not, as JSON; empty where all are finite",
            required=False,
        ),
        "proof": Variable(
            _U,
            "str",
            "proof",
            "each identity's largest error and what was allowed, on the unit's prompts, as JSON",
            required=False,
        ),
        "driver": Variable((), "str", "driver", "who drives the run, as JSON; empty if nobody"),
        "scored": Variable(
            (), "str", "prompts scored", "by part, of how many prompts the scores are, as JSON"
        ),
    },
    "scores": {
        "qk_auc": Variable(
            ("layer", "head"),
            "float",
            "QK AUC",
            _QK_AUC,
            **_auc("QK AUC"),
        ),
        "qk_auc_content": Variable(
            ("layer", "head"),
            "float",
            "QK AUC of the content part",
            "the same on score_content",
            required=False,
            **_auc("QK AUC, content"),
        ),
        "ov_auc": Variable(
            ("layer", "head"),
            "float",
            "OV AUC",
            _OV_AUC,
            **_auc("OV AUC"),
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

TABLE = "table"
"""Group of an experiment's own datasets, with any variables and dims, each described."""


BY_POSITION = {
    "attention": ("qk", "attention"),
    "score": ("qk", "score"),
    "score_content": ("qk", "score_content"),
    "label_logit": ("ov", "label_logit"),
}
"""Values of a head at each position, with their group and variable."""


def head_columns() -> dict[str, tuple[str, Variable]]:
    """Return the columns of heads by name, in order, with their first group.

    Raises
    ------
    SchemaError
        If two groups have different columns of the same name.
    """
    found: dict[str, tuple[str, Variable]] = {}
    for group, variables in GROUPS.items():
        for name, variable in variables.items():
            if variable.title and set(variable.dims) - {"prompt", "label"} == {"layer", "head"}:
                first, known = found.setdefault(name, (group, variable))
                if known.title != variable.title:
                    raise SchemaError(
                        f"the groups {first!r} and {group!r} have different columns named "
                        f"{name!r}; rename one of them"
                    )
    return found
