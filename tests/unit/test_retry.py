"""Backoff: exponential, full jitter, bounded."""

from poller.core.retry import Backoff


def test_full_jitter_under_a_doubling_ceiling() -> None:
    """Uniform between 0 and initial * 2^(tries - 1), at most the maximum."""
    highest = Backoff(0.2, 60, lambda: 1.0)
    assert [round(highest.delay(tries), 3) for tries in (1, 2, 3, 4)] == [0.2, 0.4, 0.8, 1.6]
    assert highest.delay(20) == 60
    assert highest.delay(10_000) == 60, "no overflow"
    assert Backoff(0.2, 60, lambda: 0.0).delay(5) == 0
    assert Backoff(0.2, 60, lambda: 0.5).delay(3) == 0.4


def test_a_wish_to_wait_is_obeyed_within_the_maximum() -> None:
    """Retry-After counts, but no target can stall a shard beyond the maximum."""
    backoff = Backoff(0.2, 60, lambda: 0.5)
    assert backoff.delay(1, 7.0) == 7.0
    assert backoff.delay(1, 3600.0) == 60
    assert backoff.delay(1, 0.0) == 0.1
