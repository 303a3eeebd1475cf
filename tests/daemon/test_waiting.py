from dsd.daemon.request import Request
from dsd.daemon.waiting import WaitingQueue
from dsd.ipc.messages import Sampling


def make_request(arrival: int, priority: int = 0) -> Request:
    request = Request(f"r{arrival}", [1], Sampling(), 1, priority=priority)
    request.arrival = arrival
    return request


def test_first_is_the_most_urgent_then_the_earliest() -> None:
    queue = WaitingQueue()
    requests = [make_request(1), make_request(2, -1), make_request(3), make_request(4, -1)]
    for request in requests:
        queue.push(request)
    order = []
    while queue:
        order.append(queue.first().arrival)
        queue.remove(queue.first())
    assert order == [2, 4, 1, 3]


def test_push_again_returns_to_the_old_place() -> None:
    queue = WaitingQueue()
    early, late = make_request(1), make_request(2)
    for request in (late, early):
        queue.push(request)
    assert queue.first() is early
    assert early in queue
    queue.remove(early)
    assert early not in queue
    assert queue.first() is late
