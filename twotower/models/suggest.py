"""Find an adapter for a family that nobody declared, by trying the interface's own choices.

Each choice (how a projection is split, the kind of rotary embedding, where norms stand) makes an
identity of the check hold or fail. The search runs on a small random model of the family, on
prompts longer than all its lengths. Only if exactly one combination is right everywhere is there
a suggestion; it is the text of an adapter's file, and never used by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CheckError, ModelError
from .architecture import Architecture, resolve
from .check import check_model, prompt_lengths, runs
from .kind import VOCABULARY, small_module
from .model import Model
from .random_weights import synthetic_tokenizer
from .traced import traced

SEPARATE = """
        q, k, v = (x.unflatten(-1, (-1, self.d_head)) for x in projected)
        return {q}, {k}, v"""

SPLITS = {
    "separate": SEPARATE,
    "queries, then keys, then values": """
        heads = projected[0].unflatten(-1, (-1, self.d_head))
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=-2)
        return {q}, {k}, v""",
    "query, key and value of each head": """
        q, k, v = projected[0].unflatten(-1, (self.n_heads, 3 * self.d_head)).chunk(3, dim=-1)
        return {q}, {k}, v""",
    "queries, key and value of each group": """
        grouped = projected[0].unflatten(-1, (self.n_kv_heads, -1, self.d_head))
        q, k, v = grouped[..., :-2, :].flatten(-3, -2), grouped[..., -2, :], grouped[..., -1, :]
        return {q}, {k}, v""",
}
"""Bodies of `split`, by what they do; {q} and {k} stand for norms of queries and keys."""

ROTARY: dict[str, dict[str, Any]] = {
    "halves": {},
    "neighbours": {"interleaved_rotary": True},
    "neighbours, tables by halves": {"interleaved_rotary": True, "tables": "halves"},
    "halves, each angle once": {"tables": "once"},
    "none": {"rotary": False},
}
"""Kinds of rotary embedding."""

ATTENTION, MLP = ("attn", "attention"), ("mlp", "feed_forward", "ffn", "moe")
"""Parts of the names of a block's parts."""

PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Names of output projections."""


@dataclass
class Parts:
    """Named parts of a family's blocks.

    Attributes
    ----------
    paths
        Paths of the layers, the final norm and the unembedding.
    attention, mlp, projection, qkv
        Names of the attention, the MLP, and attention's projections.
    norms
        Norms of a block, in the order in which they are defined.
    inner
        Further parts of the attention.
    """

    paths: dict[str, str]
    attention: str
    mlp: str
    projection: str
    qkv: tuple[str, ...]
    norms: list[str]
    inner: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, module: Any, n_layers: int) -> Parts:
        """Return the parts of a model, found by their names and kinds."""
        lists = [
            name
            for name, part in module.named_modules()
            if isinstance(part, torch.nn.ModuleList) and len(part) == n_layers
        ]
        if not lists:
            raise ModelError("no list of blocks was found")
        trunk = resolve(module, lists[0].rpartition(".")[0]) if "." in lists[0] else module
        after = list(trunk.named_children())
        norms = [name for name, part in after if "norm" in type(part).__name__.lower()]
        head = module.get_output_embeddings()
        names = [name for name, part in module.named_modules() if part is head]
        if not norms or not names:
            raise ModelError("no final norm or no unembedding was found")
        prefix = lists[0].rpartition(".")[0]
        paths = {
            "layers_path": lists[0],
            "final_norm_path": f"{prefix}.{norms[-1]}" if prefix else norms[-1],
            "unembedding_path": names[0],
        }
        block = resolve(module, lists[0])[0]
        children = dict(block.named_children())
        attention = _only(children, ATTENTION, "attention")
        mlp = _only(children, MLP, "MLP")
        of_block = [x for x in children if x not in (attention, mlp) and _norm(children[x])]
        inside = dict(children[attention].named_children())
        projection = next((name for name in PROJECTIONS if name in inside), None)
        if projection is None:
            raise ModelError(f"no output projection was found in {attention}")
        linear = [
            name
            for name, part in inside.items()
            if name != projection
            and getattr(part, "weight", None) is not None
            and part.weight.dim() == 2
        ]
        more = [x for x in inside if x not in (*linear, projection) and _weighted(inside[x])]
        return cls(paths, attention, mlp, projection, tuple(linear), of_block, more)


def suggest(config: Any) -> str:
    """Return the text of an adapter's file for the family of a configuration.

    Parameters
    ----------
    config
        A transformers configuration of a family without adapter.

    Raises
    ------
    ModelError
        If no combination of the interface's choices is right, or several are.
    """
    module, longest = small_module(config)
    search = _Search(module, prompt_lengths(longest))
    attention = search.only("attention", search.attentions())
    found = search.only("whole", search.norms(attention))
    return search.written(found)


class _Search:
    """Tries adapters on a small model."""

    def __init__(self, module: Any, lengths: tuple[int, int]) -> None:
        self.module, self.lengths = module, lengths
        self.parts = Parts.of(module, module.config.num_hidden_layers)
        self.tokenizer = synthetic_tokenizer(VOCABULARY)
        self.traced = traced(module, self.tokenizer)

    def adapter(self, choice: dict[str, Any]) -> type[Architecture]:
        """Return an adapter class with some choices."""
        parts, body = self.parts, choice["split"]
        names: dict[str, Any] = {}
        exec(f"def split(self, block, projected):{body}", names)
        attributes = {
            **parts.paths,
            "model_types": (self.module.config.model_type,),
            "attention_name": parts.attention,
            "mlp_name": parts.mlp,
            "projection_name": parts.projection,
            "qkv_names": parts.qkv,
            "more_names": frozenset(parts.inner),
            "attention_norm_name": None,
            "mlp_norm_name": None,
            **{name: value for name, value in choice.items() if name not in ("split", "parallel")},
            "split": names["split"],
            "parallel": property(lambda self: choice.get("parallel", False)),
        }
        return type("Suggested", (Architecture,), attributes)

    def attentions(self) -> Iterator[dict[str, Any]]:
        """Iterate over the choices that decide how heads attend."""
        fused = len(self.parts.qkv) == 1
        config = self.module.config
        grouped = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        names = [name for name in SPLITS if (name != "separate") == fused]
        if grouped == config.num_attention_heads:  # a group is one head
            names = [name for name in names if "group" not in name]
        bodies = [SPLITS[name] for name in names]
        norms = [("q", "k")]
        if len(self.parts.inner) == 2:
            a, b = (f"self.attention(block).{name}" for name in self.parts.inner)
            norms = [("q", "k"), (f"{a}(q)", f"{b}(k)")]
            width = "{}({}.flatten(-2)).unflatten(-1, (-1, self.d_head))"
            norms.append((width.format(a, "q"), width.format(b, "k")))
        for body, (q, k), rotary in itertools.product(bodies, norms, ROTARY.values()):
            yield {"split": body.format(q=q, k=k), **rotary}

    def norms(self, attention: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Iterate over the choices of where norms stand, given how heads attend."""
        kinds = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
        slots = [f"{kind}_name" for kind in kinds]
        n = len(self.parts.norms)
        for places in itertools.permutations(slots, n):
            named = dict(zip(places, self.parts.norms, strict=True))
            yield {**attention, **named}
            if "attention_post_norm_name" not in named and "mlp_post_norm_name" not in named:
                yield {**attention, **named, "parallel": True}
        if n == 1:
            shared = dict.fromkeys(("attention_norm_name", "mlp_norm_name"), self.parts.norms[0])
            yield {**attention, **shared, "parallel": True}

    def only(self, what: str, choices: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Return the only choice that is right."""
        test: Callable[[Model], bool] = self._attends if what == "attention" else self._whole
        right = [choice for choice in choices if self._holds(choice, test)]
        if len(right) == 1:
            return right[0]
        where = "how heads attend" if what == "attention" else "where norms stand"
        number = "no choice" if not right else f"more than one choice ({len(right)})"
        raise ModelError(
            f"nothing to suggest for {self.module.config.model_type!r}: {number} of {where} agrees "
            "with the model; write the adapter by hand (see CONTRIBUTING.md)"
        )

    def _holds(self, choice: dict[str, Any], test: Callable[[Model], bool]) -> bool:
        try:
            architecture = self.adapter(choice)(self.module.config)
            model = Model(self.traced, self.tokenizer, architecture, "the small model")
            return test(model)
        except Exception:  # any error of a wrong choice: shapes, names, order of modules
            return False

    def _attends(self, model: Model) -> bool:
        pairs = runs(model, self.lengths, [None])[0]["pairs"]["attention"]
        return all(float(error) <= float(allowed) for _, error, allowed in pairs)

    def _whole(self, model: Model) -> bool:
        try:
            check_model(model, self.lengths)
        except CheckError:
            return False
        return True

    def written(self, choice: dict[str, Any]) -> str:
        """Return the text of the adapter's file."""
        kind = self.module.config.model_type
        name = "".join(part.capitalize() for part in kind.replace("-", "_").split("_"))
        adapter = self.adapter(choice)
        lines = [
            f'"""{kind}: found by `twotower check --suggest`.',
            "",
            "It fits models with the parts of the one that it was made from. Outside the package,",
            "pass the class to `twotower.models.register`.",
            '"""',
            "",
            "from __future__ import annotations",
            "",
            "from typing import Any",
            "",
            "import torch",
            "",
            "from twotower.models.architecture import Architecture",
            "",
            "",
            f"class {name}(Architecture):",
            f'    """{kind}."""',
            "",
            f"    model_types = ({kind!r},)",
        ]
        for key, value in vars(adapter).items():
            default = getattr(Architecture, key, "-")
            if key in ("model_types", "split", "parallel") or key.startswith("_"):
                continue
            if value != default:
                lines.append(f"    {key} = {value!r}")
        if choice.get("parallel"):
            lines += ["", "    @property", "    def parallel(self) -> bool:", "        return True"]
        lines += [
            "",
            "    def split(",
            "        self, block: Any, projected: list[torch.Tensor]",
            "    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:" + choice["split"],
        ]
        return "\n".join(line.replace("'", '"') for line in lines) + "\n"


def _only(children: dict[str, Any], words: tuple[str, ...], what: str) -> str:
    names = [
        name
        for name, part in children.items()
        if any(word in name for word in words) and not _norm(part) and _weighted(part)
    ]
    if len(names) != 1:
        raise ModelError(
            f"a block has {len(names)} parts that may be its {what}: {sorted(children)}"
        )
    return names[0]


def _norm(part: torch.nn.Module) -> bool:
    return "norm" in type(part).__name__.lower()


def _weighted(part: torch.nn.Module) -> bool:
    return any(True for _ in part.parameters())
