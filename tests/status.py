"""Write tests/STATUS.md: what was verified of every type of causal language model in transformers.

python tests/status.py [--again] [TYPE ...]

Results are kept by type in build/status. Computed are those that are not there, those of named
types, and with `--again` all.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import warnings
from contextlib import redirect_stderr
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from families import ALONE, CLASSES, family_model, names
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from verify import LARGEST, verified

import twotower as tt
from twotower.errors import ModelError
from twotower.models.refused import RECURRENT, REFUSED
from twotower.models.registry import find_architecture
from twotower.results.provenance import versions
from twotower.testing import Planting

FOLDER = Path(__file__).parent
KEPT = FOLDER.parent / "build" / "status"
PLANTED = {
    "gpt2": "gpt2",
    "gptj": "gptj",
    "llama": "llama",
    "gpt_neox": "neox",
    "gemma2": "gemma2",
    "olmo2": "olmo2",
}
COLUMNS = (
    "proof",
    "knock-outs, last",
    "knock-outs, all",
    "attention",
    "label logits",
    "values",
    "attention edit",
)
HEAD = f"""# Architectures

This page lists every type of causal language model in transformers, and how far its heads were
verified. The models are small and random; their windows, chunks and thresholds are shorter than the
prompts. `python tests/status.py` makes the page.
`tests/families.py` holds the models, `tests/verify.py` the computations.
Errors are relative to the largest element of the reference, in float32; right is what has no error
above {LARGEST:.0e} in any variant.

- *proof*: the largest error of the identities that are proved at load.
- *knock-outs*: effects of all heads, knocked out at the last or at all positions, against hooks in
  transformers' own forward.
- *attention*: of the last position, against transformers' own attention weights.
- *label logits*: of every head against what it writes, and of all heads and the rest against the
  model's own logits.
- *values*: label logits of values, weighted by attention, against those of heads.
- *attention edit*: all heads' attention to labels tripled, against the same in transformers' own
  attention.
- *planted*: heads that were planted in a model of this family are the ones that are found.

"""


def main() -> None:
    """Verify what is not kept, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="compute what is kept again")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="only these; by default all")
    options = parser.parse_args()
    unknown = set(options.types) - set(CLASSES)
    if unknown:
        parser.error(f"transformers has no causal language models of {sorted(unknown)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    KEPT.mkdir(parents=True, exist_ok=True)
    for kind in options.types or CLASSES:
        path = KEPT / f"{kind}.json"
        if options.again or options.types or not path.exists():
            with redirect_stderr(io.StringIO()):
                found = examined(kind)
            path.write_text(json.dumps(found, indent=1))
            print(kind, verdict(found), *wrong(found), sep="\n  ", file=sys.stderr, flush=True)
    absent = [kind for kind in CLASSES if not (KEPT / f"{kind}.json").exists()]
    if absent:
        print(
            f"{len(absent)} other types are not examined yet, so the page stays as it is; without "
            "names all of them are",
            file=sys.stderr,
        )
        return
    found = {kind: json.loads((KEPT / f"{kind}.json").read_text()) for kind in sorted(CLASSES)}
    (FOLDER / "STATUS.md").write_text(page(found))
    if any(verdict(one) == "wrong" for one in found.values()):
        sys.exit("a supported type is wrong")


# ---- one type ------------------------------------------------------------------------------------


def examined(kind: str) -> dict[str, Any]:
    """Return the errors of a type's variants, or why it is not supported."""
    variants = names(kind)
    if not variants:
        return {"refused": reason(kind)}
    return {
        "variants": {name.partition("+")[2] or "": errors(name) for name in variants},
        "planted": planted(kind),
    }


def errors(name: str) -> dict[str, Any]:
    """Return a variant's adapter and errors, or the exception that it ended with."""
    try:
        module = family_model(name)
        adapter = type(find_architecture(module.config, module)).__name__
        return {"adapter": adapter, **verified(module, n=1 if name in ALONE else 2)}
    except Exception as error:  # also assertions: the page names what happened
        return {"failed": f"{type(error).__name__}: {error}"}


def reason(kind: str) -> str:
    """Return what loading says of a type that has no adapter, or why it cannot be built.

    A model that cannot be built with its default configuration has its reason from the list.
    """
    try:
        config = CONFIG_MAPPING[kind]()
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        with torch.device("meta"):
            try:
                module = AutoModelForCausalLM.from_config(config)
            except ValueError:  # the table has this class under the type of a wrapper alone
                module = getattr(transformers, CLASSES[kind])._from_config(config)
    except Exception as error:
        named = [REFUSED.get(name) for name in (kind, f"{kind}_text", f"{kind}_decoder")]
        known = next((one for one in named if one), "")
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"default configuration cannot be built ({lines[-1] if lines else type(error)})"
        return known or why
    try:
        find_architecture(module.config, module)
    except ModelError as error:
        listed = REFUSED.get(module.config.get_text_config(decoder=True).model_type)
        return listed or str(error)
    return ""  # it would be loaded without having been verified


def planted(kind: str) -> str:
    """How many of some random plantings are found exactly."""
    if kind not in PLANTED:
        return ""
    exact, n = 0, 5
    for seed in range(n):
        planting = Planting.random(PLANTED[kind], seed, noise=0.1)
        model = planting.load()
        effects = tt.head_effects(model, planting.prompts(model, shots=3), logprobs=False)
        exact += set(tt.in_context_heads(effects, len(planting.heads))) == set(planting.heads)
    return f"{exact} of {n}"


# ---- the page ------------------------------------------------------------------------------------


def verdict(found: dict[str, Any]) -> str:
    """Return "right", "wrong" or "refused"."""
    if "refused" in found:
        return "refused" if found["refused"] else "wrong"
    fine = [worst(found, column) < LARGEST for column in COLUMNS]
    return "right" if all(fine) else "wrong"


def wrong(found: dict[str, Any]) -> list[str]:
    """Return what is wrong of each variant."""
    reasons = []
    for name, one in found.get("variants", {}).items():
        large = [f"{x} {one[x]:.1e}" for x in COLUMNS if x in one and not one[x] < LARGEST]
        for reason in (*large, *([one["failed"]] if "failed" in one else [])):
            reasons.append(f"{name or 'plain'}: {reason}")
    return reasons


def worst(found: dict[str, Any], column: str) -> float:
    """Return the largest error of all variants; infinite if one has none."""
    return max(one.get(column, math.inf) for one in found["variants"].values())


def page(found: dict[str, dict[str, Any]]) -> str:
    """Return the page as Markdown."""
    by = {name: [k for k, one in found.items() if verdict(one) == name] for name in VERDICTS}
    without = [k for k in by["refused"] if found[k]["refused"] == RECURRENT]
    n_variants = sum(len(found[kind]["variants"]) for kind in by["right"])
    lines = [
        f"Of {len(found)} types {len(by['right'])} are right (in {n_variants} variants), "
        f"{len(by['wrong'])} wrong, {len(by['refused'])} refused. Of the refused, {len(without)} "
        f"have no heads that attend by softmax, and {len(by['refused']) - len(without)} have such "
        "heads but are not supported: the reasons are [below](#refused).",
        "",
        "## Supported",
        "",
        f"| type | adapter | variants | {' | '.join(COLUMNS)} | planted |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for kind in [*by["wrong"], *by["right"]]:
        if "variants" in found[kind]:
            lines.append(row(kind, found[kind]))
    lines += ["", "## Refused", "", "| type | reason |", "|---|---|"]
    lines += [f"| {kind} | {found[kind]['refused']} |" for kind in by["refused"]]
    wrong = [
        f"- {kind} {name}: {one['failed']}"
        for kind in by["wrong"]
        for name, one in found[kind].get("variants", {}).items()
        if "failed" in one
    ]
    wrong += [f"- {kind}: loads without verification" for kind in by["wrong"] if not found[kind]]
    if wrong:
        lines += ["", "## Wrong", "", *wrong]
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return HEAD + "\n".join(lines) + f"\n\nVersions: {made}; {datetime.now(UTC):%Y-%m-%d}.\n"


VERDICTS = ("right", "wrong", "refused")


def row(kind: str, found: dict[str, Any]) -> str:
    """Return a type's row: the largest errors of its variants."""
    variants = found["variants"]
    adapters = dict.fromkeys(one.get("adapter", "none") for one in variants.values())
    more = ", ".join(name or "default" for name in variants) if len(variants) > 1 else ""
    numbers = [f"{worst(found, column):.0e}" for column in COLUMNS]
    return f"| {' | '.join([kind, ', '.join(adapters), more, *numbers, found['planted']])} |"


if __name__ == "__main__":
    main()
