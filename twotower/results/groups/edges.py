"""Groups of edges: what feeds heads, and circuits."""

from __future__ import annotations

from ..variable import PROMPT, Variable

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
_EDGE = ("edge",)


EDGES: dict[str, dict[str, Variable]] = {
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
        "source_name": Variable(_EDGE, "str", "source", "head, MLP or embedding"),
        "source_at": Variable(_EDGE, "str", "where the source acts", "positions"),
        "target_name": Variable(_EDGE, "str", "target", "head, or the answer"),
        "target_at": Variable(_EDGE, "str", "where the target acts", "positions"),
        "tower": Variable(
            _EDGE, "str", "tower", "the target's queries (q), keys (k) or values (v), or the answer"
        ),
        "mean_effect": Variable(_EDGE, "float", "mean effect", "mean over prompts"),
        "low": Variable(_EDGE, "float", "low end", "of the 95% bootstrap interval over prompts"),
        "high": Variable(_EDGE, "float", "high end", "of the 95% bootstrap interval over prompts"),
        "chance": Variable(
            _EDGE,
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
            "margin if only the first heads of the ranking keep their outputs at all positions, or "
            "if all edges but the first of the ranking are cut",
        ),
        "margin_clean": Variable(PROMPT, "float", "clean margin", "with all heads, or edges"),
        "margin_without": Variable(
            PROMPT, "float", "margin without heads", "no head keeps its output, or no edge is left"
        ),
        "kept": Variable(
            ("ranking", "size"),
            "float",
            "share kept",
            "share of the mean margin between that without heads, or edges, and the clean one",
        ),
        "area": Variable(
            ("ranking",), "float", "area", "mean of the share kept over the logarithm of the size"
        ),
    },
}
