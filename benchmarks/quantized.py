"""What a quantized or half-precision run changes, against float32 on the same prompts.

The demo model is loaded anew in every form. Heads are compared by their effects at the last
position and by their two-tower scores.

    python benchmarks/quantized.py --promote
"""

from __future__ import annotations

import gc
import json
from typing import Any

import common
import numpy as np
import torch
from scipy.stats import spearmanr

import twotower as tt
from twotower.measures.agreement import agreement

FORMS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "nf4": {"dtype": "float32", "quantization": "nf4"},
}
"""int8 and nf4 with float32 beside the quantized layers, so that they alone make the change."""

SCORES = ("qk_auc", "qk_auc_content", "ov_auc")
K = 12


def compared(run: Any, exact: Any) -> dict[str, Any]:
    """A run beside the float32 one."""
    found = agreement(exact["effects"].to_dataset(), run["effects"].to_dataset(), K)
    margin, before = (r["predictions"]["margin"].values for r in (run, exact))
    row: dict[str, Any] = {
        "accuracy": round(float(run["predictions"]["correct"].mean()), 4),
        "same_answer": round(float(np.mean((margin > 0) == (before > 0))), 4),
        "margin_difference": round(float(np.abs(margin - before).mean()), 4),
        "rank_correlation": round(found.rank_correlation, 4),
        "top_12_in_common": round(found.found, 4),
    }
    for name in SCORES:
        a, b = (r["scores"][name].values.ravel() for r in (exact, run))
        row[f"{name}_rank_correlation"] = round(float(spearmanr(a, b).statistic), 4)
        row[f"{name}_largest_difference"] = round(float(np.nanmax(np.abs(a - b))), 4)
    return row


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "quantized")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--shots", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "machine": common.machine(options.threads),
        "model": options.model,
        "prompts": options.prompts,
        "forms": {},
    }
    exact = None
    for name, settings in FORMS.items():
        model = tt.load(options.model, **settings)
        task = tt.load_task("animals-cities")
        prompts = tt.build_prompts(model, task, shots=options.shots, n=options.prompts)
        run = tt.analyze(model, prompts, logprobs=False, keep="labels")
        exact = run if exact is None else exact
        row = compared(run, exact)
        row["proof"] = json.loads(run["effects"].attrs["proof"])
        row["weights_MiB"] = round(model.module.get_memory_footprint() / 2**20, 1)
        result["forms"][name] = row
        print(name, row, flush=True)
        del model
        gc.collect()
    common.finish(result, "quantized", options)


if __name__ == "__main__":
    main()
