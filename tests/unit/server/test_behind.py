"""Work behind live rows: one piece at a time, and never starved for more than its share."""

from concurrent.futures import Future

from server.behind import SHARE, Behind


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_piece_is_starved_when_it_has_waited_for_the_rest_of_what_the_last_one_took() -> None:
    clock = Clock()
    behind = Behind(clock)
    for _ in range(2):
        behind.add(lambda: None, Future())
    behind.begin()
    clock.now_s += 2.0
    assert behind.running
    assert not behind.ready
    assert not behind.starved
    behind.end()
    clock.now_s += 2.0 * (1 / SHARE - 1) - 0.01
    assert behind.ready
    assert not behind.starved
    clock.now_s += 0.02
    assert behind.starved


def test_a_piece_that_was_canceled_is_not_done_and_an_error_is_its_future_s() -> None:
    behind, done = Behind(), list[int]()
    canceled: Future[None] = Future()
    failed: Future[float] = Future()
    canceled.cancel()
    behind.add(lambda: done.append(1), canceled)
    behind.add(lambda: 1 / 0, failed)
    for _ in range(2):
        behind.begin().run()
        behind.end()
    assert done == []
    assert isinstance(failed.exception(), ZeroDivisionError)
    assert not behind.ready
