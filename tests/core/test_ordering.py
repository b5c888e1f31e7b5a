import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from thrifty.core.ordering import best_first, fill, random_key

ids_lists = st.lists(st.integers(0, 2**62), min_size=1, unique=True)
seeds = st.integers(0, 2**32 - 1)


@given(ids_lists, seeds)
def test_keys_are_one_to_one_and_each_rows_own(ids, seed):
    keys = random_key(np.array(ids), seed)
    assert len(set(keys.tolist())) == len(ids)
    assert random_key(np.array(ids[-1:]), seed)[0] == keys[-1]


def test_seeds_give_different_orders():
    ids = np.arange(1000)
    orders = [np.argsort(random_key(ids, seed)) for seed in (0, 1)]
    assert abs(np.corrcoef(*orders)[0, 1]) < 0.1


@given(ids_lists, seeds, st.randoms())
def test_equals_are_ordered_by_their_ids_whatever_order_they_come_in(ids, seed, random):
    scores = {i: np.float32(i % 3) for i in ids}
    mixed = list(ids)
    random.shuffle(mixed)
    orders = []
    for given_ids in (ids, mixed):
        order = best_first(np.array([scores[i] for i in given_ids]), np.array(given_ids), seed)
        orders.append([given_ids[place] for place in order])
    assert orders[0] == orders[1]
    ranked = [scores[i] for i in orders[0]]
    assert ranked == sorted(ranked, reverse=True)


@given(st.lists(st.integers(0, 50)), st.floats(0, 300))
def test_every_row_that_still_fits_is_taken(tokens, max_tokens):
    kept, used = [], 0
    for place, size in enumerate(tokens):
        if used + size <= max_tokens:
            kept.append(place)
            used += size
    assert fill(np.array(tokens, dtype=np.int64), max_tokens).tolist() == kept
