"""Edges into the queries of all heads beside TransformerLens's path patching, one forward an edge.

TransformerLens changes what one head's queries read by `hook_q_input`: the result of the source is
taken out at the last position, and the forward goes on from there. Some edges are drawn at random
and timed, in one process with twotower's sweep of all of them; the numbers of both must agree.
The model has GPT-2's shape and random weights. The environment is that of `peers.py`.

    .venv-peers/bin/python benchmarks/path_patching.py --threads 1 --promote
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import common
import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import twotower as tt

AGREE = 1e-3
"""Largest difference between the two, as a share of the largest effect."""


def lens_of(module: Any, tokenizer: Any) -> Any:
    """TransformerLens's bridge around a copy of a transformers model."""
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        found = TransformerBridge.boot_transformers(
            folder, hf_model=own, tokenizer=tokenizer, device="cpu"
        )
    found.set_use_split_qkv_input(True)
    found.set_use_attn_result(True)
    return found


def margin(logits: torch.Tensor, prompts: tt.Prompts) -> float:
    """The right label's logit less the largest other one, of one prompt."""
    labels = logits[0, -1, list(prompts.label_ids)]
    gold = int(prompts.gold_index[0])
    others = [float(x) for i, x in enumerate(labels) if i != gold]
    return float(labels[gold]) - max(others)


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "path_patching")
    parser.add_argument("--shots", type=int, default=9)
    parser.add_argument("--edges", type=int, default=24, help="edges of TransformerLens to time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    tt.set_options(progress=False)
    tokenizer = tt.load(options.model, check=False).tokenizer
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    module = GPT2LMHeadModel(config).eval()
    for weight in module.parameters():
        if weight.dim() == 2:  # usual initialization lets random heads do next to nothing
            weight *= 4
    model = tt.load(module, tokenizer=tokenizer)
    task = tt.load_task("animals-cities")
    prompts = tt.build_prompts(model, task, shots=options.shots, n=1)
    ids = torch.tensor(prompts.token_id)
    lens = lens_of(module, tokenizer)

    def sweep() -> Any:
        return tt.edge_effects(model, prompts, "heads", into="q")["margin_drop"]

    sweep()
    start = time.process_time()
    ours = sweep()
    own = time.process_time() - start

    logits, cache = lens.run_with_cache(ids)
    clean = margin(logits, prompts)
    plain = common.seconds(lambda: lens(ids))

    def patched(source: tt.Head, target: tt.Head) -> float:
        def hook(read: torch.Tensor, hook: Any) -> torch.Tensor:
            write = cache["result", source.layer][:, -1, source.head]
            read[:, -1, target.head] -= write
            return read

        place = f"blocks.{target.layer}.attn.hook_q_input"
        return clean - margin(lens.run_with_hooks(ids, fwd_hooks=[(place, hook)]), prompts)

    every = [(a, b) for a in model.heads for b in model.heads if a.layer < b.layer]
    rng = np.random.default_rng(0)
    some = [every[i] for i in rng.permutation(len(every))[: options.edges]]
    patched(*some[0])
    start = time.process_time()
    found = [patched(*edge) for edge in some]
    each = (time.process_time() - start) / len(some)
    same = [float(ours.sel(source=str(a), target=str(b), into="q").item()) for a, b in some]
    difference = float(np.abs(np.array(found) - np.array(same)).max())
    largest = max(map(abs, same))
    if difference > AGREE * largest:
        raise SystemExit(f"the two differ by {difference:.2g}; effects reach {largest:.2g}")
    result = {
        "machine": common.machine(options.threads),
        "shape": "GPT-2",
        "tokens": ids.shape[1],
        "edges": len(every),
        "seconds": {"twotower, all": round(own, 2), "TransformerLens, each": round(each, 4)},
        "plain_forward_seconds": round(plain, 4),
        "times_faster": round(each * len(every) / own, 1),
        "largest_effect": largest,
        "largest_difference": difference,
    }
    print(result)
    common.finish(result, "path_patching", options)


if __name__ == "__main__":
    main()
