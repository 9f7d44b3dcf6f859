from itertools import pairwise

from server.metrics import REQUEST_BUCKETS_S, make, quality

NAMES = (
    "requests_total request_seconds queue_seconds stage_seconds step_seconds batch_rows steps_total waiting running "
    "cancelled_total shed_total deadline_missed_total tier_downgraded_total swap_seconds swap_stall_seconds "
    "swaps_total "
    "model_info embedding_cache_total student_quality resident_bytes resident_limit_bytes evictions_total "
    "demand_load_seconds call_seconds_total call_expected_seconds_total engine_cache_bytes engine_cache_limit_bytes "
    "redis_memory_bytes redis_memory_limit_bytes redis_durable"
)


def test_every_name_that_the_dashboard_reads_is_there() -> None:
    text = make().exposition()[0].decode()
    assert [name for name in NAMES.split() if f"# TYPE fewstep_{name} " not in text] == []


def test_two_registries_count_apart() -> None:
    one, other = make(), make()
    one.shed.labels("overloaded").inc()
    assert one.registry.get_sample_value("fewstep_shed_total", {"reason": "overloaded"}) == 1
    assert other.registry.get_sample_value("fewstep_shed_total", {"reason": "overloaded"}) is None


def test_buckets_tell_apart_what_lies_between_a_millisecond_and_half_a_minute() -> None:
    assert (REQUEST_BUCKETS_S[0], REQUEST_BUCKETS_S[-1]) == (0.001, 30.0)
    assert all(1 < high / low <= 1.7 for low, high in pairwise(REQUEST_BUCKETS_S))


def test_the_series_of_a_version_that_is_gone_are_removed() -> None:
    metrics = make()
    metrics.steps.labels("shapes", "a@1").inc()
    metrics.steps.labels("shapes", "b@2").inc()
    metrics.student_quality.labels("shapes", "a@1", "fd").set(3)
    metrics.request_seconds.labels("shapes", "low", "a@1").observe(0.1)
    metrics.forget_version("shapes", "a@1")
    metrics.forget_quality("shapes", "a@1")
    text = metrics.exposition()[0].decode()
    assert "a@1" not in text
    assert "b@2" in text


def test_the_numbers_of_a_report_make_series_each_by_its_step_count() -> None:
    report = {
        "fd_floor": 1,
        "passed": True,
        "students": "x",
        "steps": {"1": {"fd": 3.0}, "4": {"fd": 2.0, "who": "me"}},
    }
    assert quality(report) == {"fd_floor": 1.0, "fd@1": 3.0, "fd@4": 2.0}
