"""The accessor `.tt` of runs and datasets.

Each method calls a plain function or a few of xarray's. Stored runs stay lazy.
Importing twotower registers the accessor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from .checks import one_of, whole
from .errors import InputError
from .prompts.segments import ROLES
from .results.together import alike

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from .head import Head

ESTIMATES = ("mean", "low", "high")


class Figures:
    """The figures of a run or dataset (`twotower.figures`), as methods."""

    def __init__(self, run: xr.DataTree | xr.Dataset) -> None:
        self._run = run

    def head_map(self, **options: Any) -> Axes:
        """See `twotower.figures.head_map`."""
        from . import figures

        return figures.head_map(self._run, **options)

    def two_towers(self, **options: Any) -> Axes:
        """See `twotower.figures.two_towers`."""
        from . import figures

        return figures.two_towers(self._run, **options)

    def effect_by_layer(self, **options: Any) -> Axes:
        """See `twotower.figures.effect_by_layer`."""
        from . import figures

        return figures.effect_by_layer(self._run, **options)

    def attention(self, head: Head | Sequence[int], prompt: int = 0, **options: Any) -> Axes:
        """See `twotower.figures.attention`."""
        from . import figures

        return figures.attention(self._run, head, prompt, **options)

    def label_logits(self, head: Head | Sequence[int], prompt: int = 0, **options: Any) -> Axes:
        """See `twotower.figures.label_logits`."""
        from . import figures

        return figures.label_logits(self._run, head, prompt, **options)


class _Questions:
    """Methods that datasets and runs share."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def _each(self, change: Callable[[xr.Dataset], xr.Dataset]) -> Any:
        raise NotImplementedError

    def _datasets(self) -> list[xr.Dataset]:
        raise NotImplementedError

    def _require(self, *dims: str) -> None:
        found = {dim for dataset in self._datasets() for dim in dataset.dims}
        for dim in dims:
            if dim not in found:
                raise InputError(
                    f"there is no dim {dim!r} here; dims are {', '.join(map(str, found))}"
                )

    @property
    def figure(self) -> Figures:
        """Figures, such as `run.tt.figure.head_map()`."""
        return Figures(self._data)

    def heads(self, k: int = 12, by: str = "margin_drop", label: str | None = None) -> list[Head]:
        """Return the k strongest heads, by `twotower.in_context_heads` or by another column.

        Parameters
        ----------
        k, by, label
            As in `twotower.in_context_heads`. Of a run, `by` may also be another column of its
            table of heads, such as "qk_auc"; heads whose number is not finite are left out.
        """
        from .measures.choose import GROUP_OF, in_context_heads, strongest

        other = isinstance(by, str) and by not in GROUP_OF and label is None
        if not other or not hasattr(self._data, "children"):
            return in_context_heads(self._data, k, by=by, label=label)
        from .figures.views import head_table

        table = head_table(self._data)
        one_of("by", by, sorted({*map(str, table), *GROUP_OF}))
        return strongest(table[by], whole("k", k, 1, table[by].size))

    def head(self, layer: int, head: int) -> Any:
        """Select one head, without the dims layer and head.

        Parameters
        ----------
        layer, head
            Both count from 0.

        Raises
        ------
        InputError
            If there is no such head.
        """
        self._require("layer", "head")
        whole("layer", layer)
        whole("head", head)

        def change(dataset: xr.Dataset) -> xr.Dataset:
            if not {"layer", "head"} <= set(dataset.dims):
                return dataset
            for name, value in (("layer", layer), ("head", head)):
                if value not in dataset[name].values:
                    raise InputError(f"there is no head {layer}.{head}: no {name} {value}")
            return dataset.sel(layer=layer, head=head)

        return self._each(change)

    def roles(self, *roles: str) -> Any:
        """Keep positions of the given roles; make other values NaN (texts "", token ids -1).

        Parameters
        ----------
        *roles
            One or more of bos, text, separator, label, query, last, or your own names of spans.

        Returns
        -------
        xarray.Dataset or xarray.DataTree
            Without the positions that have none of the roles in any prompt.

        Raises
        ------
        InputError
            If no position has a role, or there are no positions.
        """
        for role in roles:
            if not isinstance(role, str):
                raise InputError(f"role={role!r} is not known; give roles as texts")
        if not roles:
            raise InputError(f"give one or more of the roles {', '.join(ROLES[1:])}")
        self._require("position")

        def change(dataset: xr.Dataset) -> xr.Dataset:
            spread = {x: a for x, a in dataset.data_vars.items() if "position" in a.dims}
            if not spread:
                return dataset
            if "role" not in dataset.coords:
                raise InputError("the coordinate 'role' is missing; call roles() first")
            known = {*ROLES[1:], *map(str, dataset["role"].values.ravel())}
            unknown = [role for role in roles if role not in known]
            if unknown:
                listed = ", ".join(sorted(known - {"pad"}))
                raise InputError(f"no position has the role {unknown[0]!r}; use one of {listed}")
            here = dataset["role"].isin(list(roles))
            kept = here.any([dim for dim in here.dims if dim != "position"]).values
            found = {name: _only(array, here) for name, array in spread.items()}
            return dataset.assign(found).isel(position=kept)

        return self._each(change)

    def logit_minus(self, label: str, other: str) -> Any:
        """Subtract one label's values from another's.

        Parameters
        ----------
        label, other
            Texts of two labels; `other` is subtracted.

        Returns
        -------
        xarray.Dataset or xarray.DataTree
            Without the dim label and without variables that lack it.

        Raises
        ------
        InputError
            If a label is unknown.
        """
        self._require("label")

        def change(dataset: xr.Dataset) -> xr.Dataset:
            if "label" not in dataset.dims:
                return dataset
            for name in (label, other):
                # xarray would compare a list elementwise.
                if not isinstance(name, str) or name not in dataset["label"].values:
                    known = ", ".join(map(str, dataset["label"].values))
                    raise InputError(f"label {name!r} is not among {known}")
            kept = dataset[[x for x in dataset.data_vars if "label" in dataset[x].dims]]
            found = kept.sel(label=label, drop=True) - kept.sel(label=other, drop=True)
            for variable, array in found.data_vars.items():
                about = kept[variable].attrs
                words = f"{about.get('long_name', variable)}, {label} less {other}"
                found[variable] = array.assign_attrs({**about, "long_name": words})
            return found.assign_attrs(dataset.attrs)

        return self._each(change)

    def mean_ci(self, dim: str = "prompt", level: float = 0.95) -> Any:
        """Compute means over a dim, with confidence intervals.

        Parameters
        ----------
        dim
            Dim to average over; NaN are ignored.
        level
            Confidence level. The interval is Student's t: mean -+ t * standard error.
            For skewed values and few prompts use the bootstrap of `twotower.statistics`,
            which is not lazy.

        Returns
        -------
        xarray.Dataset or xarray.DataTree
            With the dim `estimate` (mean, low, high) in place of `dim`. Variables that are
            not numeric or lack the dim are left out.

        Raises
        ------
        InputError
            If there is no such dim, or the level is not between 0 and 1.
        """
        if not isinstance(dim, str):
            raise InputError(f"dim={dim!r} must be the name of a dim")
        if not isinstance(level, float) or not 0 < level < 1:
            raise InputError(f"level={level!r} must be between 0 and 1")
        self._require(dim)

        def change(dataset: xr.Dataset) -> xr.Dataset:
            if dim not in dataset.dims:
                return dataset
            numbers = [x for x in dataset.data_vars if dataset[x].dtype.kind in "fiub"]
            kept = dataset[[x for x in numbers if dim in dataset[x].dims]]
            return kept.map(_estimate, dim=dim, level=level).assign_attrs(dataset.attrs)

        return self._each(change)


def _require_alike(attention: xr.DataArray, logit: xr.DataArray) -> None:
    """Check that attention and label logits have the same prompts, heads and positions.

    Equal position numbers are not enough: keep="labels" renumbers positions.
    """
    for name in ("prompt", "layer", "head", "position", "token_position", "role", "label_text"):
        one, other = (name in array.coords for array in (attention, logit))
        if one != other or (one and not attention[name].equals(logit[name])):
            raise InputError(
                f"qk and ov differ in {name}: their prompts, heads or positions differ "
                "(measure both with the same keep=)"
            )


def _only(array: xr.DataArray, here: xr.DataArray) -> xr.DataArray:
    """Keep values where `here` is true; fill the rest with missing values."""
    other: Any = {"f": np.nan, "i": -1}.get(array.dtype.kind, "")
    return array.where(here, other).transpose(*array.dims).assign_attrs(array.attrs)


def _estimate(array: xr.DataArray, dim: str, level: float) -> xr.DataArray:
    from scipy.stats import t

    about = array.attrs
    array = array.astype(float)
    n = array.count(dim)
    mean = array.sum(dim) / n.where(n > 0)  # NaN without a warning where n is 0
    error = (((array - mean) ** 2).sum(dim) / (n - 1).where(n > 1) / n) ** 0.5
    width = error * xr.apply_ufunc(
        lambda count: t.ppf(0.5 + level / 2, np.maximum(count - 1, 1)),
        n,
        dask="parallelized",
        output_dtypes=[float],
    )
    index = xr.DataArray(list(ESTIMATES), dims="estimate", name="estimate")
    found: xr.DataArray = xr.concat([mean, mean - width, mean + width], index)
    return found.assign_attrs(about)


@xr.register_dataset_accessor("tt")
class DatasetQuestions(_Questions):
    """Methods of `dataset.tt`, for one group of a run.

    Examples
    --------
    >>> effects = tt.head_effects(model, prompts)
    >>> effects.tt.heads(2)
    [Head(layer=1, head=1), Head(layer=0, head=3)]
    >>> effects.tt.head(1, 1).margin_drop.dims
    ('prompt',)
    >>> effects.tt.mean_ci("prompt").margin_drop.estimate.values.tolist()
    ['mean', 'low', 'high']
    """

    def _each(self, change: Callable[[xr.Dataset], xr.Dataset]) -> xr.Dataset:
        return change(self._data)

    def _datasets(self) -> list[xr.Dataset]:
        return [self._data]

    def to_frame(self) -> pd.DataFrame:
        """Make a tidy table with one row per combination of coordinates, without padding.

        Dims that no variable has, only coordinates, are left out: each number would be repeated.

        Returns
        -------
        pandas.DataFrame
            One column per dim, variable and coordinate.

        Raises
        ------
        InputError
            If the dataset has no dims.
        """
        data: xr.Dataset = self._data
        if not data.dims:
            raise InputError("the dataset has no dims, so it has no rows to list")
        if data.data_vars:
            data = data.drop_dims({*data.dims} - {x for a in data.values() for x in a.dims})
        frame = data.to_dataframe(dim_order=list(data.dims)).reset_index()
        if "role" not in frame:
            return frame
        # Where runs of other lengths were joined, roles are missing.
        return frame[~frame["role"].isin(["pad", np.nan])].reset_index(drop=True)


@xr.register_datatree_accessor("tt")
class RunQuestions(_Questions):
    """Methods of `run.tt`, for a whole run.

    Examples
    --------
    >>> run = tt.analyze(model, prompts)
    >>> run.tt.heads(1, by="label_logit")
    [Head(layer=1, head=1)]
    >>> run.tt.head(1, 1).qk.attention.dims
    ('prompt', 'position')
    >>> run.tt.roles("label").qk.sizes["position"] < run.qk.sizes["position"]
    True
    >>> run.tt.weighted().dims
    ('prompt', 'layer', 'head', 'position', 'label')
    >>> run.ov.tt.logit_minus("foo", "bar").label_logit.dims
    ('prompt', 'layer', 'head', 'position')
    >>> list(run.tt.to_frame().columns)[2:7]
    ['margin_drop', 'label_logit', 'qk_auc', 'qk_auc_content', 'ov_auc']
    """

    def _each(self, change: Callable[[xr.Dataset], xr.Dataset]) -> xr.DataTree:
        nodes = {
            path: change(node.to_dataset(inherit=False))
            for path, node in self._data.subtree_with_keys
        }
        return xr.DataTree.from_dict(nodes)

    def _datasets(self) -> list[xr.Dataset]:
        return [node.to_dataset(inherit=False) for node in self._data.subtree]

    def weighted(self) -> xr.DataArray:
        """Multiply attention by the label logits of the value-output vectors.

        Returns
        -------
        xarray.DataArray
            (prompt, layer, head, position, label): what each position adds to each label's
            logit through each head (Yu & Ananiadou 2024: weighted value-output vectors).

        Raises
        ------
        InputError
            If the run lacks `qk` or `ov`.
        """
        from .figures.views import one_run

        run = one_run(self._data)
        for name in ("qk", "ov"):
            if name not in run.children:
                raise InputError(f"weighted() needs the group {name!r}; run analyze with it")
        logit, attention = (
            run.children["ov"].dataset["label_logit"],
            run.children["qk"].dataset["attention"],
        )
        alike({name: run.children[name].to_dataset(inherit=False) for name in ("qk", "ov")})
        _require_alike(attention, logit)
        found = attention * logit.drop_vars(set(logit.coords) - set(logit.dims))
        about = {
            "long_name": "label logit of the weighted value-output vector",
            "units": "1",
            "reference": f"attention times {logit.attrs.get('reference', 'ov.label_logit')}",
        }
        return found.transpose(*logit.dims).rename("weighted").assign_attrs(about)

    def to_frame(self) -> pd.DataFrame:
        """Make a table with one row per head and the columns of `twotower.figures.head_table`.

        For one group (`run.qk.tt.to_frame()`), make the tidy table of its dataset.
        """
        if "twotower_group" in self._data.attrs:
            return DatasetQuestions(self._data.to_dataset()).to_frame()
        from .figures.views import head_table

        return head_table(self._data).to_dataframe(dim_order=["layer", "head"]).reset_index()
