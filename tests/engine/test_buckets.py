"""`buckets`: every text once, of similar length, inside both limits."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from QEfficient.engine.buckets import CALL_COST, buckets

LENGTHS = st.lists(st.integers(1, 300), max_size=80)


@given(LENGTHS, st.integers(1, 40), st.integers(1, 2000))
def test_groups_cover_all_texts_within_the_limits(lengths, rows, tokens):
    groups = buckets(lengths, rows, tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    flat = [lengths[index] for group in groups for index in group]
    assert flat == sorted(flat)
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert len(group) <= rows
        assert len(group) == 1 or len(group) * longest <= tokens
        assert sum(longest - lengths[index] for index in group) <= CALL_COST


@given(LENGTHS, st.integers(1, 40), st.integers(1, 2000))
def test_no_two_neighbours_could_have_been_one(lengths, rows, tokens):
    groups = buckets(lengths, rows, tokens)
    for group, following in itertools.pairwise(groups):
        joined = [*(lengths[index] for index in group), lengths[following[0]]]
        too_many = len(joined) > rows or len(joined) * joined[-1] > tokens
        assert too_many or sum(joined[-1] - length for length in joined) > CALL_COST


@given(LENGTHS, st.integers(1, 40))
def test_without_a_limit_of_tokens_groups_are_full(lengths, rows):
    sizes = [len(group) for group in buckets(lengths, rows, None)]
    assert sum(sizes) == len(lengths)
    assert all(size == rows for size in sizes[:-1])
