from . import agreement as agreement
from . import analyze as analyze
from . import attribution as attribution
from . import attribution_patching as attribution_patching
from . import bias as bias
from . import choose as choose
from . import circuit as circuit
from . import collect as collect
from . import complete as complete
from . import datasets as datasets
from . import edges as edges
from . import effects as effects
from . import faithfulness as faithfulness
from . import function_vector as function_vector
from . import greedy as greedy
from . import group_effects as group_effects
from . import head_kinds as head_kinds
from . import measure as measure
from . import ov as ov
from . import pair_effects as pair_effects
from . import parts as parts
from . import predict as predict
from . import predictions as predictions
from . import qk as qk
from . import residual as residual
from . import scores as scores
from . import shares as shares
from . import towers as towers
from . import trace as trace
from . import tracing as tracing
from . import whole_answers as whole_answers

__all__ = [
    "agreement",
    "analyze",
    "attribution",
    "attribution_patching",
    "bias",
    "choose",
    "circuit",
    "collect",
    "complete",
    "datasets",
    "edges",
    "effects",
    "faithfulness",
    "function_vector",
    "greedy",
    "group_effects",
    "head_kinds",
    "measure",
    "ov",
    "pair_effects",
    "parts",
    "predict",
    "predictions",
    "qk",
    "residual",
    "scores",
    "shares",
    "towers",
    "trace",
    "tracing",
    "whole_answers",
]
