"""Answers that differ by prompt or have several tokens, against the reference in float64."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import not_finite
import numpy as np
import pytest
import torch
import xarray as xr
from reference import Reference
from tiny import TWO, WORDS, byte_level, hf_model, sentencepiece, tiny
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

import twotower as tt
from twotower.measures.complete import complete
from twotower.measures.trace import trace_effects
from twotower.walk import readout, readouts

TEXTS = ["When Mary and John left, John thanked", "Then Bob saw Al and Al greeted", "a b"]
RIGHT = [" Mary", " Bob", " foo"]
WRONG = [[" John", " Ma"], [" Al", " Bo"], [" bar", " foo bar"]]
SPANS = [{"S": (25, 29)}, {"S": (20, 22)}, {"S": (0, 1)}]
ARCHITECTURES = ("gpt2", "gptj", "llama-grouped")


def ids_of(prompts: tt.Prompts, row: int) -> list[int]:
    return [int(t) for t in prompts.token_id[row] if t >= 0]


def tokens_of(prompts: tt.Prompts, row: int, label: int) -> list[int]:
    ids = [int(t) for t in prompts.answers.token_id[row, label] if t >= 0]
    return ids[:1] if prompts.answers.scoring == "first" else ids


def logprobs(
    reference: Reference,
    before: list[int],
    answer: list[int],
    head: tuple[int, int] | None = None,
    at: Sequence[bool] | None = None,
) -> np.ndarray:
    """Log-probability of every token of an answer, perhaps with a head's output zero at `at`."""
    n = len(before)

    def edit(layer: int, z: torch.Tensor) -> torch.Tensor:
        if head is not None and layer == head[0]:
            where = np.array([*at, *[at[-1]] * (len(answer) - 1)])
            z[..., torch.as_tensor(where), head[1], :] = 0
        return z

    found = reference.run(torch.tensor(before + answer[:-1]), edit).logits.log_softmax(-1)
    return np.array([float(found[n - 1 + i, token]) for i, token in enumerate(answer)])


def scores(reference: Reference, prompts: tt.Prompts, row: int, *edit: Any) -> np.ndarray:
    """(label,) scores of a prompt's answers."""
    found = []
    for label in range(len(prompts.labels)):
        tokens = tokens_of(prompts, row, label)
        total = logprobs(reference, ids_of(prompts, row), tokens, *edit).sum()
        per = {
            "mean": len(tokens),
            "characters": len(prompts.answers.text[row, label].lstrip()),
        }.get(prompts.answers.scoring, 1)
        found.append(total / per)
    return np.array(found)


def margin(values: np.ndarray, gold: int = 0) -> float:
    if len(values) == 1:
        return float(values[0])
    return float(values[gold] - np.delete(values, gold).max())


def masks(prompts: tt.Prompts, positions: Any) -> np.ndarray:
    if isinstance(positions, str):
        return prompts.where(positions)
    return positions.mask(prompts)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("scoring", ["sum", "mean", "characters"])
def test_effects_on_answers_of_several_tokens(name: str, scoring: str) -> None:
    """Every knock-out equals a separate forward for each answer; prompts are padded."""
    if scoring != "sum" and name != "llama-grouped":
        pytest.skip("scores are weighted after the walk")
    model = tiny(name)
    reference = Reference(model.module)
    prompts = tt.contrast(model, TEXTS, RIGHT, WRONG, SPANS, scoring=scoring)
    answers = tt.predict(model, prompts)
    for positions in ("last", "all", tt.at(role="S")):
        effects = tt.head_effects(model, prompts, positions)
        at = masks(prompts, positions)
        for row in range(len(prompts)):
            real = prompts.token_id[row] >= 0
            clean = scores(reference, prompts, row)
            np.testing.assert_allclose(answers["logprob"][row], clean, rtol=1e-4)
            for head in [(0, 1), (1, 2), (2, 0)]:
                changed = scores(reference, prompts, row, head, at[row][real])
                drop = effects.sel(prompt=row, layer=head[0], head=head[1])
                expected = margin(clean) - margin(changed)
                assert abs(float(drop["margin_drop"]) - expected) < 1e-4
                np.testing.assert_allclose(drop["logprob_drop"], clean - changed, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("wrong", [[" foo", " map", " bar"], None])
def test_answers_of_one_token_by_prompt(name: str, wrong: list[str] | None) -> None:
    model = tiny(name)
    reference = Reference(model.module)
    texts = [f"{text}:" for text in TEXTS]
    prompts = tt.contrast(model, texts, [" bar", " key", " foo"], wrong, SPANS)
    assert not prompts.answers.several
    answers = tt.predict(model, prompts)
    effects = tt.head_effects(model, prompts, logprobs=False)
    everywhere = tt.head_effects(model, prompts, "all")
    attribution = tt.attribution(model, prompts)
    for row in range(3):
        clean = scores(reference, prompts, row)
        assert abs(float(answers["margin"][row]) - margin(clean)) < 1e-4
        length = len(ids_of(prompts, row))
        for found, at in (
            (effects, [False] * (length - 1) + [True]),
            (everywhere, [True] * length),
        ):
            for head in [(0, 3), (2, 1)]:
                changed = scores(reference, prompts, row, head, at)
                got = float(found["margin_drop"].sel(prompt=row, layer=head[0], head=head[1]))
                assert abs(got - (margin(clean) - margin(changed))) < 1e-4
        run = reference.run(torch.tensor(ids_of(prompts, row)))
        tokens = tuple(int(t) for t in prompts.answers.first[row])
        block = reference.blocks[1]
        write = torch.einsum("hd,hde->he", run.z[1][-1], block.out)
        expected = reference.label_logit(write, run.residual[-1][-1], tokens)
        np.testing.assert_allclose(
            attribution["label_logit"].sel(prompt=row, layer=1), expected, atol=1e-4
        )
    gradient = tt.attribution_patching(model, prompts)
    assert (
        np.corrcoef(gradient["margin_drop"].values.ravel(), effects["margin_drop"].values.ravel())[
            0, 1
        ]
        > 0.5
    )


def test_a_gradient_of_several_tokens_is_the_slope() -> None:
    """Scaling a head's output by 1 - e lowers the margin by e times the estimate."""
    model = tiny("llama-grouped")
    prompts = tt.contrast(model, TEXTS, RIGHT, [w[0] for w in WRONG])
    estimate = tt.attribution_patching(model, prompts)["margin_drop"]
    small = tt.head_effects(model, prompts, to=tt.Times(1 - 1e-2))["margin_drop"] / 1e-2
    np.testing.assert_allclose(estimate, small, atol=0.02 * float(abs(small).max()))


def test_classification_with_labels_of_several_tokens() -> None:
    model = tiny("llama-grouped")
    reference = Reference(model.module)
    template = "{text}:{label}\n"
    labels = ("very negative", "positive")
    prompts = tt.build_prompts(model, TWO, labels, shots=1, n=3, template=template)
    assert prompts.answers.several
    run = tt.analyze(model, prompts, logprobs=True)
    held = prompts.token[0][prompts.role[0] == "label"]
    assert "very negative" in "".join(held)
    gold = prompts.gold_index
    for row in range(3):
        clean = scores(reference, prompts, row)
        assert abs(float(run["predictions"]["margin"][row]) - margin(clean, gold[row])) < 1e-4
    assert run["predictions"].attrs["scoring"] == "sum"
    assert "logit" not in run["predictions"]
    groups = tt.group_effects(model, prompts, [[(0, 0)], [(0, 0), (1, 1)]])
    single = run["effects"]["margin_drop"].sel(layer=0, head=0)
    np.testing.assert_allclose(groups["margin_drop"].isel(group=0), single, atol=1e-5)
    edited = tt.predict(model, prompts, tt.KnockOut([(0, 0), (1, 1)]))
    lost = run["predictions"]["margin"] - edited["margin"]
    np.testing.assert_allclose(groups["margin_drop"].isel(group=1), lost, atol=1e-4)


def replaced(
    reference: Reference, before: list[int], answer: list[int], new: torch.Tensor, head: tt.Head
) -> float:
    """Log-probability of an answer whose predictions get other outputs (m, D) of a head."""
    m = len(answer)

    def edit(layer: int, z: torch.Tensor) -> torch.Tensor:
        if layer == head.layer:
            z[..., -m:, head.head, :] = new
        return z

    found = reference.run(torch.tensor(before + answer[:-1]), edit).logits.log_softmax(-1)
    return sum(float(found[i - m, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("to", ["mean", "from", "resample"])
def test_replacements_hold_where_the_answer_is_predicted(to: str) -> None:
    """An answer follows its donor as well; a mean is that of the references' last positions."""
    model, head = tiny("llama-grouped"), tt.Head(1, 1)
    reference = Reference(model.module)
    prompts = tt.contrast(model, TEXTS, RIGHT, [w[0] for w in WRONG])
    others = prompts[[1, 2, 0]]
    single = tt.contrast(model, ["x y z"], [" foo"])
    changes = {"mean": tt.Mean(others), "from": tt.From(others), "resample": tt.Resample(single)}
    effects = tt.head_effects(model, prompts, to=changes[to])
    edited = tt.predict(model, prompts, tt.KnockOut([head], to=changes[to]))
    clean = tt.predict(model, prompts)
    assert prompts.answers.several
    for row in range(3):
        for label in range(2):
            tokens = tokens_of(prompts, row, label)
            if to == "mean":
                all_z = [reference.run(torch.tensor(ids_of(others, i))).z[1] for i in range(3)]
                new = torch.stack([z[-1, head.head] for z in all_z]).mean(dim=0)
            else:
                donor = ids_of(others, row) if to == "from" else ids_of(single, 0)
                run = reference.run(torch.tensor(donor + tokens[:-1]))
                new = run.z[1][-len(tokens) :, head.head]
            expected = replaced(reference, ids_of(prompts, row), tokens, new, head)
            assert abs(float(edited["logprob"][row, label]) - expected) < 1e-4
            drop = effects["logprob_drop"].sel(head._asdict())[row, label]
            assert abs(float(clean["logprob"][row, label] - drop) - expected) < 1e-4


@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_prompt_is_its_own_donor_without_effect(positions: str) -> None:
    model = tiny("llama-grouped")
    prompts = tt.contrast(model, TEXTS, RIGHT, [w[0] for w in WRONG])
    effects = tt.head_effects(model, prompts, positions, to=tt.From(prompts))
    np.testing.assert_allclose(effects["margin_drop"], 0, atol=1e-5)
    slopes = tt.attribution_patching(model, prompts, positions, to=tt.From(prompts))
    np.testing.assert_allclose(slopes["margin_drop"], 0, atol=1e-5)
    traced = tt.causal_tracing(model, prompts, prompts, positions)
    np.testing.assert_allclose(traced["margin_gain"], 0, atol=1e-5)
    completed = trace_effects(model, prompts, [" bar foo"] * 3, positions, to=tt.From(prompts))
    np.testing.assert_allclose(completed["logprob_drop"].fillna(0), 0, atol=1e-5)


@pytest.mark.parametrize("what", ["values", "attention"])
def test_patches_take_from_donors_with_the_same_answers(what: str) -> None:
    """Answers of several tokens are scored as the prompts followed by their first tokens."""
    model = tiny("llama-grouped")
    right, wrong = [" foo bar", " map key"], [" foo foo", " bar"]
    prompts = tt.contrast(model, ["x y z:", "k j:"], right, wrong)
    donors = tt.contrast(model, ["y z x:", "j k:"], right)
    assert (donors.lengths == prompts.lengths).all()
    edit = tt.Patch([(0, 1), (1, 2)], donors, what)
    own = tt.Patch([(0, 1), (1, 2)], prompts, what)
    clean = tt.predict(model, prompts)
    same = tt.predict(model, prompts, own)
    np.testing.assert_allclose(same["logprob"], clean["logprob"], atol=1e-5)
    found = tt.predict(model, prompts, edit)["logprob"].values
    assert prompts.answers.several
    for row in range(len(prompts)):
        for number in range(2):
            ids = [x for x in prompts.answers.token_id[row, number].tolist() if x >= 0]
            total = 0.0
            for n, token in enumerate(ids):
                start = model.tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)
                answer = model.tokenizer.decode([token], clean_up_tokenization_spaces=False)
                one, other = (
                    tt.contrast(model, [x.items[row].string + start], [answer], join="")
                    for x in (prompts, donors)
                )
                assert one.answers.token_id.ravel().tolist() == [token]
                single = tt.Patch([(0, 1), (1, 2)], other, what, positions=last(n + 1, one))
                total += tt.predict(model, one, single)["logprob"].item()
            assert abs(total - found[row, number]) < 1e-4


def last(n: int, prompts: tt.Prompts) -> np.ndarray:
    """(prompt, position) mask of the last n positions."""
    return np.arange(prompts.n_positions)[None] >= prompts.n_positions - n


def test_tracing_reads_the_clean_answers() -> None:
    model = tiny("llama-grouped")
    texts = [f"{text}:" for text in ("cat dog", "one two")]
    clean = tt.contrast(model, texts, [" foo", " map"], [" bar", " key"])
    other = tt.contrast(model, ["dog cat:", "two one:"], [" cup", " sun"], [" red", " box"])
    traced = tt.causal_tracing(model, clean, other)
    asked = other.asked_like(clean)
    np.testing.assert_allclose(
        traced["margin_corrupted"], tt.predict(model, asked)["margin"], atol=1e-5
    )
    edited = tt.predict(model, asked, tt.KnockOut([(1, 2)], to=tt.From(clean)))
    gain = edited["margin"] - traced["margin_corrupted"]
    np.testing.assert_allclose(traced["margin_gain"].sel(layer=1, head=2), gain, atol=1e-4)


COMPLETIONS = [" foo because\nbar", " bar", " foo, ok"]


@pytest.mark.parametrize("positions", ["last", "all"])
def test_effects_on_every_token_of_a_completion(positions: str) -> None:
    model = tiny("llama-grouped")
    reference = Reference(model.module)
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=1)
    spans = [{"answer": "bar"}, {"answer": "bar"}, {"answer": "ok", "start": " foo"}]
    found = trace_effects(model, prompts, COMPLETIONS, positions, spans=spans)
    for row, text in enumerate(COMPLETIONS):
        before = ids_of(prompts, row)
        tokens = byte_level()(prompts.strings[row] + text)["input_ids"][len(before) :]
        at = [positions == "all"] * (len(before) - 1) + [True]
        clean = logprobs(reference, before, tokens)
        one = found.sel(prompt=row)
        np.testing.assert_allclose(one["logprob"][: len(tokens)], clean, atol=1e-4)
        assert one["logprob"][len(tokens) :].isnull().all()
        assert "".join(one["token_text"].values) == text
        drop = clean - logprobs(reference, before, tokens, (1, 3), at)
        swept = one["logprob_drop"].sel(layer=1, head=3)
        np.testing.assert_allclose(swept[: len(tokens)], drop, atol=1e-4)
        of_answer = (one["span"] == "answer").values[: len(tokens)]
        total = float(one["answer_drop"].sel(layer=1, head=3))
        assert abs(total - drop[of_answer].sum()) < 1e-4
    kept = trace_effects(model, prompts, COMPLETIONS, positions, spans=spans, keep="answer")
    assert kept["token_text"].values.tolist() == [["bar", ""], [" bar", ""], ["o", "k"]]
    np.testing.assert_allclose(kept["answer_drop"], found["answer_drop"], atol=1e-6)


@pytest.mark.parametrize(
    ("completions", "options", "message"),
    [
        ([" foo"], {}, "entry for each of 3 prompts"),
        (["", " a", " b"], {}, "prompt 0: the completion is ''"),
        ([" foo"] * 3, {"spans": [{"answer": "bar"}, {}, {}]}, "'bar' occurs 0 times"),
        ([" foo"] * 3, {"keep": "answer"}, "the completions have no spans; pass spans="),
        (
            [" foo"] * 3,
            {"keep": "answer", "spans": [{"x": "foo"}] * 3},
            "no token has such a span; there are x",
        ),
        ([" foo" * 300] * 3, {}, "with its completion and the model takes 256"),
    ],
)
def test_completions_that_do_not_fit(
    completions: list[str], options: dict[str, Any], message: str
) -> None:
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=1)
    with pytest.raises(tt.errors.InputError, match=message):
        trace_effects(model, prompts, completions, **options)


def with_texts_of_all_tokens(name: str) -> tt.Model:
    """A model whose tokenizer has a text for every token that it may generate."""
    module, tokenizer = hf_model(name), copy.deepcopy(byte_level())
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), module.config.vocab_size)])
    return tt.load(module, tokenizer=tokenizer, check=False)


def text_of(model: tt.Model, tokens: list[int]) -> str:
    """The text of a completion, without its end token or a character that was cut."""
    if tokens[-1] == model.config.eos_token_id:
        return model.tokenizer.decode(tokens[:-1])
    return re.sub("\N{REPLACEMENT CHARACTER}{1,3}$", "", model.tokenizer.decode(tokens))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["last", "all"])
def test_greedy_completions_with_heads_knocked_out(name: str, positions: str) -> None:
    """Equal to one plain forward for each token, with hooks; prompts are padded."""
    model = with_texts_of_all_tokens(name)
    end = model.config.eos_token_id
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=1)
    heads = [(0, 1), (2, 0)]
    found = complete(model, prompts, 5, tt.KnockOut(heads, positions))
    plain = complete(model, prompts, 5)
    assert all(plain)
    assert found != plain
    for heads_out, texts in ((heads, found), ([], plain)):
        for row, text in enumerate(texts):
            before = ids_of(prompts, row)
            start = len(before) - 1 if positions == "last" else 0
            handles = []
            for layer, head in heads_out:

                def zero(module: Any, inputs: Any, head: int = head, start: int = start) -> Any:
                    z = inputs[0].clone()
                    size = z.shape[-1] // model.n_heads
                    z[:, start:, head * size : (head + 1) * size] = 0
                    return (z, *inputs[1:])

                block = model.architecture.layers(model.module)[layer]
                projection = model.architecture.projection(block)
                handles.append(projection.register_forward_pre_hook(zero))
            tokens: list[int] = []
            while len(tokens) < 5 and (not tokens or tokens[-1] != end):
                with torch.no_grad():
                    logits = model.module(torch.tensor([before + tokens])).logits
                tokens.append(int(logits[0, -1].argmax()))
            for handle in handles:
                handle.remove()
            assert text == text_of(model, tokens)


@pytest.mark.parametrize("to", ["from", "resample"])
def test_greedy_completions_with_outputs_of_donors(to: str) -> None:
    """The same tokens follow the donor; equal to one plain forward of both for each token."""
    model = with_texts_of_all_tokens("llama-grouped")
    reference = Reference(model.module)
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=1)
    others = prompts[[1, 2, 0]]
    if to == "resample":
        others = tt.build_prompts(model, TWO, shots=2, n=1, seed=3)[[0, 0, 0]]
    change = tt.From(others) if to == "from" else tt.Resample(others[[0]])
    found = complete(model, prompts, 4, tt.KnockOut([(1, 2)], to=change))
    for row, text in enumerate(found):
        before, donor = ids_of(prompts, row), ids_of(others, row)
        tokens: list[int] = []
        while len(tokens) < 4:
            z = reference.run(torch.tensor(donor + tokens)).z[1][len(donor) - 1 :, 2]

            def edit(layer: int, own: torch.Tensor, z: torch.Tensor = z) -> torch.Tensor:
                if layer == 1:
                    own[..., -len(z) :, 2, :] = z
                return own

            logits = reference.run(torch.tensor(before + tokens), edit).logits
            tokens.append(int(logits[-1].argmax()))
        assert model.config.eos_token_id not in tokens
        assert text == text_of(model, tokens)


def test_greedy_completions_with_every_edit() -> None:
    """Edits that equal others give their completions; a prompt is its own donor without effect."""
    model = with_texts_of_all_tokens("gptj")
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=1)
    heads = [(0, 1), (2, 0)]
    plain, without = complete(model, prompts, 5), complete(model, prompts, 5, tt.KnockOut(heads))
    assert plain != without
    edges = [(head, "answer", "answer") for head in model.heads]
    cut = complete(model, prompts, 5, tt.CutEdges(edges))
    for edit, expected in (
        (tt.ScaleAttention(heads, 0, "all"), without),
        ([tt.KnockOut(heads[:1]), tt.ScaleAttention(heads[1:], 0, "all")], without),
        (tt.KnockOut(heads, "all", to=tt.From(prompts)), plain),
        (tt.Patch(heads, prompts, "values"), plain),
        (tt.DropPosition([(0, 1)], "labels"), None),
    ):
        found = complete(model, prompts, 5, edit)
        assert expected is None or found == expected, edit
    assert cut not in (plain, without)


@pytest.mark.parametrize("rows", [[0], [0, *range(20, 60)], slice(None)])
def test_tokens_whose_unembedding_is_zero(rows: Any) -> None:
    """Such as that of a padding token; a proof does not divide by their logits."""
    module = hf_model("llama-grouped")
    with torch.no_grad():
        module.lm_head.weight[rows] = 0
    model = tt.load(module, tokenizer=byte_level(), check=rows != slice(None))
    prompts = tt.contrast(model, TEXTS, RIGHT, [w[0] for w in WRONG])
    head = tt.Head(1, 1)
    effects = tt.head_effects(model, prompts)["margin_drop"].sel(head._asdict())
    clean, edited = (
        tt.predict(model, prompts, edits)["margin"] for edits in ([], tt.KnockOut([head]))
    )
    np.testing.assert_allclose(effects, clean - edited, atol=1e-5)


PENALTIES = {
    "repetition_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(0, 300, 2)),
    "guidance_scale": 3.0,
    "num_beams": 3,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 2,
    "stop_strings": ["a"],
}


def test_settings_of_the_checkpoint_do_not_change_completions() -> None:
    module = hf_model("llama-grouped")
    model = tt.load(module, tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=1)
    plain = complete(model, prompts, 8)
    for name, value in PENALTIES.items():
        module.generation_config = GenerationConfig(**{name: value})
        assert complete(model, prompts, 8) == plain, name
        assert getattr(module.generation_config, name) == value


def test_generation_that_is_not_greedy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a server adds settings of its own."""
    module = hf_model("llama-grouped")
    model = tt.load(module, tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=1)
    monkeypatch.setattr("twotower.measures.complete._own_settings", lambda *_: nullcontext())
    module.generation_config = GenerationConfig(suppress_tokens=list(range(0, 300, 2)))
    with pytest.raises(tt.errors.ModelError, match="it is not greedy"):
        complete(model, prompts, 8)


def test_a_cache_that_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=1)
    own = DynamicLayer.update

    def forgetful(self: Any, *arguments: Any, **options: Any) -> Any:
        keys, values = own(self, *arguments, **options)
        return keys, values * (1 if keys.shape[2] == arguments[0].shape[2] else 3)

    complete(model, prompts, 4)
    monkeypatch.setattr(DynamicLayer, "update", forgetful)
    with pytest.raises(tt.errors.CheckError, match="not the largest logit in a forward without"):
        complete(model, prompts, 4)


def test_hooks_that_completions_cannot_prove_are_refused() -> None:
    model = tt.load(hf_model("llama-grouped"), tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=1)
    model.module.model.layers[1].mlp.register_forward_hook(lambda m, given, out: out * 2)
    with pytest.raises(tt.errors.CheckError, match="forward hook"):
        complete(model, prompts, 3)


def test_completions_of_prompts_that_overflow() -> None:
    module, prompts = copy.deepcopy(not_finite.model().module), not_finite.prompts()[:6]
    with torch.no_grad():
        module.lm_head.weight[:260] = 0  # control tokens and bytes
        module.lm_head.weight[len(byte_level()) :] = 0
    model = tt.load(module, tokenizer=byte_level())
    bad = not_finite.holds(prompts)
    assert 0 < bad.sum() < 6
    with pytest.warns(tt.errors.NotFiniteWarning, match=rf"{bad.sum()} of 6 prompts"):
        found = complete(model, prompts, 8)
    for number in range(6):
        alone = [""] if bad[number] else complete(model, prompts[[number]], 8)
        assert found[number] == alone[0]
    assert any(found)


def test_completions_keep_spaces_and_control_tokens() -> None:
    """Tokenized after its prompt, a completion gives the generated tokens."""
    tokenizer = sentencepiece()
    module = hf_model("llama-grouped")
    module.resize_token_embeddings(len(tokenizer))
    wanted = tokenizer.convert_tokens_to_ids(["▁foo", "<s>", "▁bar", "▁foo"])
    with torch.no_grad():  # the logits name the token that follows the one before
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
        table = torch.randn(len(tokenizer), module.config.hidden_size)
        module.set_input_embeddings(torch.nn.Embedding.from_pretrained(table))
        head = torch.zeros_like(table)
        before = tokenizer("cat:")["input_ids"][-1]
        normed = torch.nn.functional.rms_norm(table, table.shape[1:]) * module.model.norm.weight
        for token, following in zip([before, *wanted], wanted, strict=False):
            head[following] = normed[token] * 10
        module.lm_head = torch.nn.Linear(*head.shape[::-1], bias=False)
        module.lm_head.weight.copy_(head)
    module.config.tie_word_embeddings = False
    model = tt.load(module.eval(), tokenizer=tokenizer)
    prompts = tt.contrast(model, ["cat:"], [" foo"])
    (text,) = complete(model, prompts, 3)
    assert text == " foo<s> bar"
    with pytest.raises(tt.errors.InputError, match=r"the completion .* contains '<s>'"):
        trace_effects(model, prompts, [text])
    found = trace_effects(model, prompts, [text], control_tokens=True)
    assert found["token_text"].values.tolist() == [[" foo", "<s>", " bar"]]
    assert tokenizer(f"cat:{text}")["input_ids"][-3:] == wanted[:3]


def test_completions_that_are_refused() -> None:
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=1, n=2)
    with pytest.raises(tt.errors.InputError, match="do not fit into the model's 256"):
        complete(model, prompts, 250)
    with pytest.raises(tt.errors.InputError, match="stop='' must be a text"):
        complete(model, prompts, 2, stop="")


def test_old_readouts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Label directions of one question after another do not fill the memory."""
    model = tiny("gpt2")

    def held(label: str) -> int:
        tt.head_effects(model, tt.contrast(model, TEXTS, [f" {label}"] * len(TEXTS)))
        return sum(key[0] == "readout" for key in model.cache)

    assert held("a") + 1 == held("b")
    monkeypatch.setattr("twotower.walk.readout.READOUT_BYTES", 1)
    assert held("d") == 1
    assert held("a") == 1


@pytest.mark.parametrize("more", ["", " foo"], ids=["one token", "two tokens"])
def test_very_many_answers(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers whose directions do not fit at once are read in parts, with the same numbers."""
    texts = [f"{'a b ' * (i % 3)}{word}:" for i, word in enumerate(WORDS[:8])]
    answers = [[f"{letter}{more}" for letter in letters] for letters in ("abcdefgh", "ijklmnop")]
    model = tiny("gpt2")
    prompts = tt.contrast(model, texts, answers[0], answers[1])
    assert len(set(prompts.answers.first.ravel())) == 16
    groups = ("predictions", "attribution", "effects", "ov")

    def measured() -> list[Any]:
        with tt.set_options(batch_size=2):
            run = tt.analyze(model, prompts, measures=("attribution", "effects", "ov"))
        return [run[name].to_dataset() for name in groups if name in run]

    whole = measured()
    model.cache.clear()
    made, probe = [], readout._probe
    monkeypatch.setattr(readout, "_probe", lambda a, b, ids: made.append(ids) or probe(a, b, ids))
    monkeypatch.setattr(readouts, "WINDOW_BYTES", 5 * readout.bytes_per_label(model))
    parts = measured()
    assert len(parts) >= 3
    for one, other in zip(whole, parts, strict=True):
        xr.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    # The first labels when the measures are prepared, and then those of a batch and the next.
    assert max(map(len, made)) == 5
    assert len(made) < 8


def test_characters_after_leading_blanks() -> None:
    model = tiny("gpt2")
    prompts = tt.contrast(model, ["cat:"], [" foo\n"], [" bar\n\n"], scoring="characters")
    assert prompts.answers.weights.tolist() == [[1 / 4, 1 / 5]]
