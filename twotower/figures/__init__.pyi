from .circuits import circuit as circuit
from .circuits import circuit_graph as circuit_graph
from .circuits import save_circuit as save_circuit
from .curves import bias_curves as bias_curves
from .curves import knocked_out as knocked_out
from .heads import effect_by_layer as effect_by_layer
from .heads import head_map as head_map
from .heads import two_towers as two_towers
from .positions import attention as attention
from .positions import label_logits as label_logits
from .report import write_report as write_report
from .views import PromptView as PromptView
from .views import head_table as head_table
from .views import prompt_view as prompt_view

__all__ = [
    "PromptView",
    "attention",
    "bias_curves",
    "circuit",
    "circuit_graph",
    "effect_by_layer",
    "head_map",
    "head_table",
    "knocked_out",
    "label_logits",
    "prompt_view",
    "save_circuit",
    "two_towers",
    "write_report",
]
