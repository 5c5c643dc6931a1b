"""Packs of positions, and plans of counterfactual runs, by hand."""

from __future__ import annotations

import numpy as np

from twotower.sweep.counterfactuals import plan
from twotower.sweep.layout import Layout, make_layout


def layout(
    token_id: list[list[int]], at: list[list[int]], kinds=None, width: float = 1e9
) -> Layout:
    ids = np.array(token_id)
    kinds = np.zeros(ids.shape, dtype=int) if kinds is None else np.array(kinds)
    return make_layout(ids, np.array(at, dtype=bool), kinds, width, [])


def test_the_last_position_alone() -> None:
    found = layout([[-1, 5, 6, 7], [1, 2, 3, 4]], [[0, 0, 0, 1], [0, 0, 0, 1]])
    assert found.source.own.tolist() == [[7], [3]]  # packs are in the order of the tokens
    assert found.earlier.own.tolist() == [[4, 5, 6], [1, 2, 0]]
    assert found.visible.own.tolist() == [[[True] * 4], [[True, True, False, True]]]
    assert found.prompt.own.tolist() == [[1], [0]]
    assert found.distance.own[0].tolist() == [[3, 2, 1, 0]]


def test_all_positions_of_one_prompt_are_causal() -> None:
    found = layout([[5, 6, 7]], [[1, 1, 1]])
    assert found.causal
    assert found.earlier.own.shape == (1, 0)
    np.testing.assert_array_equal(found.visible.own[0], np.tri(3, dtype=bool))


def test_a_common_beginning_stands_once() -> None:
    found = layout([[1, 2, 3, 4], [1, 2, 5, 6]], [[0, 1, 1, 1], [0, 1, 1, 1]])
    assert found.source.own.tolist() == [[1, 2, 3, 6, 7]]
    assert found.earlier.own.tolist() == [[0]]
    seen = [[0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5]]
    assert [np.flatnonzero(row).tolist() for row in found.visible.own[0].numpy()] == seen
    assert found.distance.own[0, 4].tolist()[:2] == [3, 2]
    assert found.distance.own[0, 4, 4].item() == 1
    assert found.last.own.tolist() == [[2, 4]]
    assert found.prompt.own.tolist() == [[0], [1]]
    assert not found.causal


def test_what_is_changed_otherwise_is_not_common() -> None:
    ids, at = [[1, 2, 3], [1, 2, 4]], [[1, 1, 1], [1, 1, 1]]
    assert layout(ids, at).source.own.numel() == 4
    assert layout(ids, at, kinds=[[0, 0, 0], [1, 1, 1]]).source.own.numel() == 6
    # Changed in one prompt, clean in the other.
    assert layout(ids, [[1, 1, 1], [0, 0, 1]]).source.own.shape == (2, 3)


def test_a_large_pack_must_be_worth_its_attention() -> None:
    ids, at = [[1, 2, 3, 4], [1, 5, 6, 7]], [[1] * 4] * 2
    assert layout(ids, at).source.own.shape == (1, 7)
    # Where attention is all that costs: 7 x 7 pairs are more than twice 4 x 4.
    assert layout(ids, at, width=1e-9).source.own.shape == (2, 4)


def test_singles_branch_off_the_clean_run() -> None:
    found = plan([((0, 0),), ((0, 1),), ((1, 0),)], 3)
    assert [step.n_before for step in found.steps] == [0, 2, 3]
    assert found.steps[0].parents == [-1, -1]
    assert found.steps[1].heads == [(0,)]
    assert found.order == [0, 1, 2]
    assert found.row_layers == 2 + 3 + 3


def test_groups_share_their_lower_heads() -> None:
    groups = [((0, 0), (1, 1)), ((0, 0), (2, 0), (2, 1)), ((1, 0), (1, 1))]
    found = plan(groups, 3)
    assert found.steps[0].heads == [(0,)]  # both groups' first head, once
    assert found.steps[1].parents == [0, -1]
    assert found.steps[1].heads == [(1,), (0, 1)]
    assert found.steps[1].kept == [0]  # still needed as a parent
    assert found.steps[2].heads == [(0, 1)]
    assert found.steps[2].parents == [0]
    assert found.steps[2].kept == [1, 2]  # and no longer
    assert found.order == [0, 2, 1]


def test_what_comes_after_a_change_at_the_first_position_is_changed() -> None:
    found = layout([[5, 6, 7]], [[1, 0, 0]])
    assert found.source.own.tolist() == [[0, 1, 2]]
    assert found.earlier.own.shape == (1, 0)


def test_a_position_left_alone_is_not_one_that_is_changed() -> None:
    """Kinds are numbers from 0 up; none of them stands for no change."""
    for kind in range(3):
        found = layout(
            [[1, 2, 5, 3], [1, 2, 5, 4]], [[0, 1, 1, 1], [0, 0, 1, 1]], kinds=[[kind] * 4] * 2
        )
        assert found.source.own.tolist() == [[6, 7, 0], [1, 2, 3]]
