import pytest

from engines.cost import CostKey, CostModel

KEY = CostKey("denoise", "a" * 64, (4, 8, 8))
OTHER = CostKey("denoise", "b" * 64, (4, 8, 8))


def model() -> CostModel:
    made = CostModel()
    for size, seconds in ((1, 0.01), (4, 0.02), (8, 0.03)):
        made.observe(KEY, size, seconds)
    return made


@pytest.mark.parametrize(("rows", "seconds"), [(1, 0.01), (2, 0.02), (4, 0.02), (5, 0.03), (8, 0.03), (17, 0.07)])
def test_rows_cost_the_calls_that_hold_them(rows: int, seconds: float) -> None:
    assert model().predict(KEY, rows) == pytest.approx(seconds)


def test_what_was_never_measured_has_no_prediction() -> None:
    assert model().predict(OTHER, 1) is None
    assert model().seconds(KEY, 2) is None


def test_a_new_measurement_moves_the_mean_a_tenth_of_the_way() -> None:
    made = model()
    made.observe(KEY, 1, 0.02)
    assert made.seconds(KEY, 1) == pytest.approx(0.011)


def test_the_quickest_call_of_any_size_is_remembered_whatever_later_ones_take() -> None:
    made = model()
    made.observe(KEY, 4, 0.004)
    made.observe(KEY, 1, 0.003, lone=True)
    made.observe(KEY, 1, 9.0)
    made.inherit(OTHER, KEY)
    assert made.least_s(KEY) == made.least_s(OTHER) == 0.003
    made.forget([KEY.blob])
    assert (made.least_s(KEY), made.least_s(OTHER)) == (0.0, 0.003)


def test_the_other_sizes_follow_in_proportion_and_a_little_less() -> None:
    made = model()
    for _ in range(200):
        made.observe(KEY, 8, 0.06)
    assert made.seconds(KEY, 8) == pytest.approx(0.06)
    assert made.seconds(KEY, 1) == pytest.approx(0.01 * 2**0.9, rel=0.01)
    assert made.seconds(KEY, 4) == pytest.approx(0.02 * 2**0.9, rel=0.01)


def test_other_weights_of_a_graph_cost_the_same_until_measured() -> None:
    made = model()
    made.inherit(OTHER, KEY)
    made.observe(OTHER, 1, 0.11)
    assert made.predict(OTHER, 8) == pytest.approx(0.03 * 1.9)
    assert made.seconds(OTHER, 1) == pytest.approx(0.02)
    assert made.seconds(KEY, 1) == pytest.approx(0.01)


def test_a_snapshot_restores_the_same_predictions() -> None:
    restored = CostModel.restore(model().snapshot())
    assert restored.snapshot() == model().snapshot()
    assert restored.predict(KEY, 17) == model().predict(KEY, 17)


def test_a_blob_that_is_gone_is_forgotten() -> None:
    made = model()
    made.forget([KEY.blob])
    assert made.predict(KEY, 1) is None


def test_lone_calls_are_known_apart_and_any_call_stands_in_for_them() -> None:
    made = model()
    assert made.lone_s(KEY, 1) == pytest.approx(0.01)
    made.observe(KEY, 1, 0.006, lone=True)
    for _ in range(200):
        made.observe(KEY, 1, 0.03)
    assert made.lone_s(KEY, 1) == pytest.approx(0.006)
    assert made.seconds(KEY, 1) == pytest.approx(0.03)
    made.inherit(OTHER, KEY)
    assert made.lone_s(OTHER, 1) == pytest.approx(0.006)
    made.forget([KEY.blob])
    assert (made.lone_s(KEY, 1), made.lone_s(OTHER, 1)) == (None, pytest.approx(0.006))
