from . import errors as errors
from . import figures as figures
from . import measures as measures
from . import prompts as prompts
from .edits.changes import From as From
from .edits.changes import Mean as Mean
from .edits.changes import Resample as Resample
from .edits.changes import Times as Times
from .edits.changes import Zero as Zero
from .edits.edits import Add as Add
from .edits.edits import CutEdges as CutEdges
from .edits.edits import DropPosition as DropPosition
from .edits.edits import KnockOut as KnockOut
from .edits.edits import Patch as Patch
from .edits.edits import ScaleAttention as ScaleAttention
from .errors import TwoTowerError as TwoTowerError
from .head import Head as Head
from .measures.analyze import analyze as analyze
from .measures.attribution import attribution as attribution
from .measures.attribution_patching import attribution_patching as attribution_patching
from .measures.bias import label_bias as label_bias
from .measures.bias import majority_label as majority_label
from .measures.choose import in_context_heads as in_context_heads
from .measures.circuit import circuit as circuit
from .measures.complete import complete as complete
from .measures.edges import edge_effects as edge_effects
from .measures.effects import head_effects as head_effects
from .measures.faithfulness import faithfulness as faithfulness
from .measures.function_vector import function_vector as function_vector
from .measures.greedy import greedy_heads as greedy_heads
from .measures.group_effects import group_effects as group_effects
from .measures.head_kinds import head_kinds as head_kinds
from .measures.ov import ov_labels as ov_labels
from .measures.pair_effects import pair_effects as pair_effects
from .measures.parts import margin_parts as margin_parts
from .measures.parts import score_parts as score_parts
from .measures.predict import predict as predict
from .measures.qk import qk_similarity as qk_similarity
from .measures.scores import two_tower_scores as two_tower_scores
from .measures.towers import towers_of as towers_of
from .measures.trace import trace_effects as trace_effects
from .measures.tracing import causal_tracing as causal_tracing
from .models import Model as Model
from .models import load as load
from .options import set_options as set_options
from .prompts import PairTask as PairTask
from .prompts import Prompts as Prompts
from .prompts import Task as Task
from .prompts import at as at
from .prompts import build_prompts as build_prompts
from .prompts import contrast as contrast
from .prompts import load_pairs as load_pairs
from .prompts import load_task as load_task
from .prompts import prompts_from_strings as prompts_from_strings
from .results import open as open
from .results import save as save

__all__ = [
    "Add",
    "CutEdges",
    "DropPosition",
    "From",
    "Head",
    "KnockOut",
    "Mean",
    "Model",
    "PairTask",
    "Patch",
    "Prompts",
    "Resample",
    "ScaleAttention",
    "Task",
    "Times",
    "TwoTowerError",
    "Zero",
    "__version__",
    "analyze",
    "at",
    "attribution",
    "attribution_patching",
    "build_prompts",
    "causal_tracing",
    "circuit",
    "complete",
    "contrast",
    "edge_effects",
    "errors",
    "faithfulness",
    "figures",
    "function_vector",
    "greedy_heads",
    "group_effects",
    "head_effects",
    "head_kinds",
    "in_context_heads",
    "label_bias",
    "load",
    "load_pairs",
    "load_task",
    "majority_label",
    "margin_parts",
    "measures",
    "open",
    "ov_labels",
    "pair_effects",
    "predict",
    "prompts",
    "prompts_from_strings",
    "qk_similarity",
    "save",
    "score_parts",
    "set_options",
    "towers_of",
    "trace_effects",
    "two_tower_scores",
]

__version__: str
