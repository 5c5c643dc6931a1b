from . import figures as figures
from .errors import CheckError as CheckError
from .errors import FetchError as FetchError
from .errors import FindingError as FindingError
from .errors import InputError as InputError
from .errors import ModelError as ModelError
from .errors import NotFiniteWarning as NotFiniteWarning
from .errors import SchemaError as SchemaError
from .errors import StoreError as StoreError
from .errors import TwoTowerError as TwoTowerError
from .errors import TwoTowerWarning as TwoTowerWarning
from .errors import WorkerError as WorkerError
from .head import Head as Head
from .intervention import DropPosition as DropPosition
from .intervention import KnockOut as KnockOut
from .intervention import Patch as Patch
from .intervention import Scale as Scale
from .intervention import ScaleAttention as ScaleAttention
from .measures import Agreement as Agreement
from .measures import agreement as agreement
from .measures import analyze as analyze
from .measures import attention_shares as attention_shares
from .measures import attribution as attribution
from .measures import attribution_patching as attribution_patching
from .measures import bias_reduction as bias_reduction
from .measures import causal_tracing as causal_tracing
from .measures import greedy_heads as greedy_heads
from .measures import group_effects as group_effects
from .measures import head_effects as head_effects
from .measures import in_context_heads as in_context_heads
from .measures import label_bias as label_bias
from .measures import majority_label as majority_label
from .measures import ov_labels as ov_labels
from .measures import pair_effects as pair_effects
from .measures import predict as predict
from .measures import qk_similarity as qk_similarity
from .measures import recent_label as recent_label
from .measures import residual_streams as residual_streams
from .measures import strongest_group as strongest_group
from .measures import subset_effects as subset_effects
from .measures import two_tower_scores as two_tower_scores
from .models import Architecture as Architecture
from .models import Model as Model
from .models import load as load
from .options import set_options as set_options
from .prompts import At as At
from .prompts import Prompts as Prompts
from .prompts import Task as Task
from .prompts import at as at
from .prompts import build_prompts as build_prompts
from .prompts import bundled_tasks as bundled_tasks
from .prompts import load_task as load_task
from .prompts import prompts_from_strings as prompts_from_strings
from .results import open as open
from .results import save as save

__all__ = [
    "Agreement",
    "Architecture",
    "At",
    "CheckError",
    "DropPosition",
    "FetchError",
    "FindingError",
    "Head",
    "InputError",
    "KnockOut",
    "Model",
    "ModelError",
    "NotFiniteWarning",
    "Patch",
    "Prompts",
    "Scale",
    "ScaleAttention",
    "SchemaError",
    "StoreError",
    "Task",
    "TwoTowerError",
    "TwoTowerWarning",
    "WorkerError",
    "__version__",
    "agreement",
    "analyze",
    "at",
    "attention_shares",
    "attribution",
    "attribution_patching",
    "bias_reduction",
    "build_prompts",
    "bundled_tasks",
    "causal_tracing",
    "figures",
    "greedy_heads",
    "group_effects",
    "head_effects",
    "in_context_heads",
    "label_bias",
    "load",
    "load_task",
    "majority_label",
    "open",
    "ov_labels",
    "pair_effects",
    "predict",
    "prompts_from_strings",
    "qk_similarity",
    "recent_label",
    "residual_streams",
    "save",
    "set_options",
    "strongest_group",
    "subset_effects",
    "two_tower_scores",
]

__version__: str
