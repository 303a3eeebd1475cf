import pytest

from dsd.daemon.ticks import Calendar


def test_fire_takes_the_rows_of_that_tick_in_order() -> None:
    calendar = Calendar()
    for row, tick in ((3, 10), (1, 10), (2, 11)):
        calendar.arm(row, tick)
    assert calendar.due(10, 10) == [3, 1]
    assert calendar.fire(10, 10) == [3, 1]
    assert calendar.fire(10, 10) == []
    assert calendar.dates() == {2: 11}


def test_disarm_leaves_nothing_behind() -> None:
    calendar = Calendar()
    calendar.arm(1, 10)
    calendar.disarm(1)
    calendar.disarm(1)
    assert (len(calendar), calendar.fire(10, 10)) == (0, [])


def test_arm_twice_asserts() -> None:
    calendar = Calendar()
    calendar.arm(1, 10)
    with pytest.raises(AssertionError, match="armed for 10"):
        calendar.arm(1, 11)
