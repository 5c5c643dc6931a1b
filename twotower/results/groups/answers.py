"""Groups of prompts, answers and runs."""

from __future__ import annotations

from ..variable import PAPER, PROMPT, PROMPT_LABEL, PROMPT_POSITION, Variable

_UNIT = ("unit",)


ANSWERS: dict[str, dict[str, Variable]] = {
    "prompts": {
        "token_id": Variable(PROMPT_POSITION, "int", "token id", "-1 where padded"),
        "token": Variable(PROMPT_POSITION, "str", "token", "the token's text"),
        "text": Variable(PROMPT, "str", "query", "the query's text"),
    },
    "predictions": {
        "logit": Variable(
            PROMPT_LABEL,
            "float",
            "label logit",
            "the model's own logit of the label; only of labels of one token",
            required=False,
        ),
        "logprob": Variable(
            PROMPT_LABEL,
            "float",
            "label log-probability",
            "over the whole vocabulary; of several tokens the sum of their log-probabilities, each "
            "given the tokens before it, or as the attribute `scoring` says",
            "nat",
        ),
        "margin": Variable(
            PROMPT,
            "float",
            "margin",
            "logit of the right label minus the largest logit among the other labels. Of labels of "
            "several tokens, the same of log-probabilities (for one token both are equal). Without "
            "other labels, the right one's log-probability",
        ),
        "correct": Variable(
            PROMPT,
            "bool",
            "right among the labels",
            "the right label has the largest logit of all labels (or log-probability, as the "
            "margin). Without other labels, as top1_correct",
        ),
        "top_token": Variable(PROMPT, "str", "most likely token", "over the whole vocabulary"),
        "top1_correct": Variable(
            PROMPT,
            "bool",
            "right over the vocabulary",
            f"the most likely token is the right label ({PAPER}, accuracy). Of labels of several "
            "tokens: each token is the most likely one after those before it",
        ),
    },
    "bias": {
        "logit_bias": Variable(
            PROMPT,
            "float",
            "logit bias",
            "logit of the favoured label less the mean of the others'; its mean over prompts with "
            f"balanced right answers is the bias (after {PAPER})",
        ),
        "count_bias": Variable(
            PROMPT,
            "float",
            "count bias",
            "1 where the favoured label has the largest logit of all labels, else 0, less 1 over "
            f"the number of labels; its mean over such prompts is the bias (after {PAPER})",
        ),
        "favoured": Variable(
            PROMPT,
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
        "part": Variable(
            _UNIT, "str", "part of the run", "a model, a task and a seed; may be empty"
        ),
        "start": Variable(_UNIT, "int", "first prompt", "number of the unit's first prompt"),
        "stop": Variable(_UNIT, "int", "end of the prompts", "number after the unit's last prompt"),
        "state": Variable(_UNIT, "str", "state", "done, failed, or empty where it is not measured"),
        "seconds": Variable(
            _UNIT, "float", "time taken", "wall time of measuring and writing", "s"
        ),
        "finished": Variable(_UNIT, "float", "time of the end", "since the Unix epoch", "s"),
        "worker": Variable(_UNIT, "str", "worker", "host and process that measured it"),
        "error": Variable(_UNIT, "str", "error", "the last one, of a unit that failed"),
        "not_finite": Variable(
            _UNIT,
            "str",
            "not finite",
            "prompts of the unit whose logits are not finite, and by group the number of single "
            "values that are not, as JSON; empty where all are finite",
            required=False,
        ),
        "proof": Variable(
            _UNIT,
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
}
