"""Write experiments/README.md from the committed results.

twotower experiments run --all --out runs/experiments
python -m experiments.page --promote runs/experiments   # makes them the committed ones
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from experiments import recovered_edges, recovery

FOLDER = Path(__file__).parent
HEAD = """# Experiments

What the paper claims (Yu & Ananiadou 2024, [arXiv:2402.02872](https://arxiv.org/abs/2402.02872)),
each claim as one file that is read from top to bottom: the claim, the prompts, the measurement, and
a verdict by a rule that is stated before the numbers. Numbers 14 to 17 ask what it leaves open:
other forms of questions, other kinds of heads, heads that harm, and the circuit around them. This
page is made by `experiments/page.py` from `results/*.json`; do not edit it by hand.

    twotower experiments list
    twotower experiments run qk-similarity            # or: python experiments/qk_similarity.py
    twotower experiments run --all                    # goes on where it was interrupted
    twotower experiments run --all --model huggyllama/llama-7b --device-map auto

The paper's models are larger and its prompts are not known here in detail, so figures of the paper
stand beside what was measured for comparison; nothing here reproduces a table of it. Intervals are
95% bootstrap intervals over prompts of all seeds together, n is the number of those prompts.
Numbers without an interval are means over the seeds, of the heads that are named, or counts.
All of it took 103 minutes on two cores of an AMD EPYC, in two processes of one thread each; the
trainings of number 9 (12 small models, to 98% and more) take 33 minutes more of one thread. Numbers
14 to 16 took 60 minutes more, of one thread beside other work; 10 took 15 and 17 took 26 so.
"""


def results() -> list[dict[str, Any]]:
    """The committed results, in the suite's order."""
    found = [json.loads(path.read_text()) for path in (FOLDER / "results").glob("*.json")]
    return sorted(found, key=lambda result: result["number"])


def page(found: list[dict[str, Any]]) -> str:
    """The whole page."""
    lines = [HEAD, "| | experiment | claim | verdict |", "|---|---|---|---|"]
    lines += [
        f"| {r['number']} | [{r['title']}](#{anchor(r['title'])}) | {r['claim']} | {r['verdict']} |"
        for r in found
    ]
    studies = [
        study.section(json.loads((FOLDER / name).read_text()))
        for study, name in ((recovery, "recovery.json"), (recovered_edges, "recovered-edges.json"))
    ]
    return "\n".join([*lines, "", *studies, *(section(r) for r in found)])


def section(result: dict[str, Any]) -> str:
    """One experiment."""
    size, provenance = result["size"], result["provenance"]
    quantized = "" if result["quantization"] == "none" else f", {result['quantization']}"
    rows = [f"| {words} | {number(value)} |" for words, value in result["numbers"].items()]
    versions = ", ".join(f"{name} {v}" for name, v in provenance["versions"].items())
    seeds, subject, shots = provenance["seeds"], result.get("subject"), ""
    if not subject:
        subject = (
            f"{result['model']} ({result['dtype']}{quantized}); {result['task']} with labels "
            f"{', '.join(result['labels'])}"
        )
        shots = f", {size['shots']} demonstrations per label unless the numbers say otherwise"
    prompts = result.get("prompts") or (
        f"{size['n_fit']} prompts to choose on and {size['n_test']} to test on{shots}"
    )
    return "\n".join(
        [
            f"## {result['title']}",
            "",
            f"**Claim.** {result['claim']} ([{script(result)}]({script(result)}))",
            "",
            f"**The paper.** {result['paper']}",
            "",
            f"**Here: {result['verdict']}.** {result['reason']}",
            "",
            f"![{result['title']}](figures/{result['name']}.png)",
            "",
            *(
                line
                for title, own in result.get("tables", {}).items()
                for line in table(title, own)
            ),
            f"Rule: {result['rule']}",
            "",
            f"<details><summary>All numbers ({len(rows)})</summary>",
            "",
            "| measured | |",
            "|---|---|",
            *rows,
            "",
            "</details>",
            "",
            f"{subject}; seeds {', '.join(map(str, seeds))}, for each {prompts}.",
            "",
            f"<sub>{provenance['created'][-1][:10]}; {versions}; commit "
            f"{provenance['git_commit'][-1][:12]}</sub>",
            "",
        ]
    )


def table(title: str, about: dict[str, Any]) -> list[str]:
    """A table with its title."""
    columns, rows = about["columns"], about["rows"]
    lines = [f"**{title}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(map(number, row))} |" for row in rows]
    return [*lines, ""]


def script(result: dict[str, Any]) -> str:
    """The file of an experiment."""
    (path,) = (
        path
        for path in FOLDER.glob("*.py")
        if f'name="{result["name"]}"' in path.read_text(encoding="utf-8")
    )
    return path.name


def number(value: Any) -> str:
    """A number with its interval and n."""
    if isinstance(value, dict):
        if value["low"] is None:
            return f"{decimals(value['value'])} (n = {value['n']})"
        interval = ", ".join(decimals(value[end]) for end in ("low", "high"))
        return f"{decimals(value['value'])} [{interval}] (n = {value['n']})"
    return decimals(value) if isinstance(value, float) else str(value)


def decimals(value: float | None) -> str:
    """Two decimals, or three where two would hide a small number."""
    if value is None:
        return "not a number"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3f}"


def anchor(title: str) -> str:
    """The anchor that a heading gets."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def main() -> None:
    """Promote results where asked, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--promote", type=Path, help="a folder of results to make the committed")
    options = parser.parse_args()
    if options.promote:
        for path in sorted(options.promote.glob("*.json")):
            if json.loads(path.read_text())["size"]["name"] != "full":
                raise SystemExit(f"{path} is of the quick form; run the full one")
            for kind, folder in (("json", "results"), ("png", "figures"), ("svg", "figures")):
                (FOLDER / folder).mkdir(exist_ok=True)
                shutil.copy(path.with_suffix(f".{kind}"), FOLDER / folder)
    (FOLDER / "README.md").write_text(page(results()))


if __name__ == "__main__":
    main()
