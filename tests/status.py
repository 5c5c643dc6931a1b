"""Write tests/STATUS.md: what was verified of every architecture, and by which versions.

python tests/status.py
"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr
from datetime import UTC, datetime
from pathlib import Path

import torch
from tiny import ARCHITECTURES, FURTHER, THREE, tiny

import twotower as tt
from twotower.models.check import check_model
from twotower.results.provenance import versions
from twotower.testing import Planting

FOLDER = Path(__file__).parent
PLANTED = {
    "gpt2": "gpt2",
    "gptj": "gptj",
    "llama-grouped": "llama",
    "neox-parallel": "neox",
    "gemma2": "gemma2",
    "olmo2": "olmo2",
}
HEAD = """# Architectures

What was verified of every architecture, on small random models; made by `python tests/status.py`.
Errors are relative to the largest element of the reference, float32.

- *proof*: the largest error of the identities that are proved at load.
- *knock-outs*: effects of all heads, knocked out at all positions, against hooks in transformers'
  own forward, one head and one prompt at a time.
- *attention*: of the last position, against transformers' own attention weights.
- *planted*: heads that were planted in a model of this family are the ones that are found.

"""


def knock_out_error(model: tt.Model, prompts: tt.Prompts) -> float:
    """Of the effects on log-probabilities, against hooks."""
    found = tt.head_effects(model, prompts, positions="all").logprob_drop.values
    labels, worst, scale = list(prompts.label_ids), 0.0, 0.0
    for number, ids in enumerate(prompts.token_id):
        tokens = torch.tensor(ids[ids >= 0])[None]
        clean = _answer(model, tokens)[labels]
        for head in model.heads:
            block = model.architecture.layers(model.module)[head.layer]
            handle = model.architecture.projection(block).register_forward_pre_hook(
                lambda module, inputs, head=head: _zeroed(inputs[0], model.n_heads, head.head)
            )
            drop = (clean - _answer(model, tokens)[labels]).numpy()
            handle.remove()
            worst = max(worst, float(abs(found[number][head] - drop).max()))
            scale = max(scale, float(abs(drop).max()))
    return worst / scale


def _answer(model: tt.Model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module(tokens, use_cache=False).logits[0, -1].log_softmax(-1)


def _zeroed(z: torch.Tensor, n_heads: int, head: int) -> tuple[torch.Tensor]:
    z = z.clone().unflatten(-1, (n_heads, -1))
    z[..., head, :] = 0
    return (z.flatten(-2),)


def attention_error(model: tt.Model, prompts: tt.Prompts) -> float:
    """Of the last position's attention, against transformers' own."""
    found = tt.qk_similarity(model, prompts).attention.values
    worst = 0.0
    for number, ids in enumerate(prompts.token_id):
        tokens = torch.tensor(ids[ids >= 0])[None]
        with torch.no_grad():
            own = model.module(tokens, use_cache=False, output_attentions=True).attentions
        for layer, weights in enumerate(own):
            last = weights[0, :, -1].numpy()
            worst = max(worst, float(abs(found[number, layer, :, -last.shape[-1] :] - last).max()))
    return worst


def planted(name: str) -> str:
    """How many of some random plantings are found exactly."""
    if name not in PLANTED:
        return ""
    exact, n = 0, 5
    for seed in range(n):
        planting = Planting.random(PLANTED[name], seed, noise=0.1)
        model = planting.load()
        effects = tt.head_effects(model, planting.prompts(model, shots=3), logprobs=False)
        exact += set(tt.in_context_heads(effects, len(planting.heads))) == set(planting.heads)
    return f"{exact} of {n}"


def main() -> None:
    """Verify, and write the page."""
    torch.set_num_threads(1)
    rows = ["| architecture | adapter | proof | knock-outs | attention | planted |"]
    rows.append("|---|---|---|---|---|---|")
    for name in [*ARCHITECTURES, *FURTHER]:
        with redirect_stderr(io.StringIO()):
            model = tiny(name)
            prompts = tt.build_prompts(model, THREE, shots=2, n=2, seed=2)
            errors = (
                max(one.error for one in check_model(model).values()),
                knock_out_error(model, prompts),
                attention_error(model, prompts),
            )
            cells = [name, type(model.architecture).__name__, *(f"{x:.0e}" for x in errors)]
            rows.append(f"| {' | '.join([*cells, planted(name)])} |")
        print(rows[-1], file=sys.stderr)
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    foot = f"\nVersions: {made}; {datetime.now(UTC):%Y-%m-%d}.\n"
    (FOLDER / "STATUS.md").write_text(HEAD + "\n".join(rows) + "\n" + foot)


if __name__ == "__main__":
    main()
