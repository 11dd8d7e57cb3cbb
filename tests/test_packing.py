"""The plan: every row once an epoch, steps inside epochs, packs full, all of it a function of the seed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import fill_packs, make_plan, split, waste, weighted

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=120)


def plan_for(lengths, **changes):
    arguments = dict(seed=1, epochs=2, max_steps=None, packs_per_step=4, capacity=None)
    rows = np.arange(len(lengths))
    return make_plan(np.array(lengths), rows, np.empty(0, np.int64), np.ones(len(rows)), **{**arguments, **changes})


@given(LENGTHS, st.integers(64, 100))
@settings(max_examples=150, deadline=None)
def test_packs_hold_every_row_once_and_never_more_than_fits(lengths, capacity):
    packs = fill_packs(np.array(lengths), capacity)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in pack) <= capacity for pack in packs)


@given(LENGTHS, st.booleans(), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_each_epoch_trains_each_row_once_in_steps_that_do_not_cross_it(lengths, packing, per_step, seed):
    plan = plan_for(lengths, epochs=3, capacity=64 if packing else None, packs_per_step=per_step, seed=seed)
    start = 0
    for end in plan.epoch_ends:
        rows = [row for step in range(start + 1, end + 1) for group in plan.micro_batches(step, 2) for row in group]
        assert sorted(rows) == list(range(len(lengths)))
        start = end
    assert start == plan.total_steps


def test_the_same_seed_gives_the_same_plan_and_another_seed_another():
    lengths = np.random.default_rng(0).integers(5, 60, 200)
    a, b, c = (plan_for(lengths, seed=seed, capacity=64) for seed in (7, 7, 8))
    assert np.array_equal(a.rows, b.rows)
    assert not np.array_equal(a.rows, c.rows)
    first, second = (a.rows[: len(lengths)], a.rows[len(lengths) :])
    assert not np.array_equal(first, second), "each epoch has an order of its own"


def test_micro_batches_of_any_size_hold_the_same_rows_of_a_step():
    plan = plan_for(range(1, 40), packs_per_step=6)
    for step in range(1, plan.total_steps + 1):
        wanted = np.concatenate(plan.micro_batches(step, 6))
        for size in (1, 2, 4):
            assert np.array_equal(np.concatenate(plan.micro_batches(step, size)), wanted)


def test_max_steps_wins_over_epochs_both_ways():
    assert plan_for([5] * 10, max_steps=1).total_steps == 1
    assert plan_for([5] * 10, max_steps=25).total_steps == 25


def test_half_an_epoch_is_half_of_the_steps():
    assert plan_for([5] * 80, epochs=1.5, packs_per_step=4).total_steps == 30


def test_skewed_lengths_waste_less_than_two_percent_of_2048_token_packs():
    lengths = np.minimum(np.random.default_rng(3).lognormal(5.7, 0.8, 4000).astype(int) + 8, 2048)
    assert waste(plan_for(lengths, capacity=2048, epochs=1), lengths, 2048) < 0.02


def test_weights_change_how_often_a_row_is_seen():
    rows = np.arange(1000)
    weights = np.where(rows < 500, 2.0, 0.5)
    seen = weighted(rows, weights, seed=1, epoch=0)
    counts = np.bincount(seen, minlength=1000)
    assert (counts[:500] == 2).all()
    assert 200 < counts[500:].sum() < 300


@given(st.integers(1, 400), st.floats(0, 0.5), st.integers(1, 50), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_a_split_parts_the_rows_and_always_leaves_one_to_train(rows, share, most, seed):
    trained, held_out = split(rows, share, most, seed)
    assert sorted([*trained, *held_out]) == list(range(rows))
    assert len(trained) >= 1 and len(held_out) <= most
