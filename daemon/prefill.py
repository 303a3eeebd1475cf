"""Which prompts a step computes, and how much of each."""

from collections.abc import Callable, Iterator, Sequence

from .request import Request
from .waiting import WaitingQueue


def plan_prefills(
    prefilling: Sequence[Request],
    waiting: WaitingQueue,
    budget: int,
    join: Callable[[Request], bool],
) -> Iterator[tuple[Request, int]]:
    """(request, number of its next tokens to compute), while `budget` tokens last.

    The caller plans each chunk before it asks for the next. `join` gives a waiting request its row
    and blocks. In line: one that does not fit is not overtaken, or it might wait for ever.
    """
    for request in tuple(prefilling):
        if not budget:
            return
        length = min(budget, request.num_left)
        yield request, length
        budget -= length
    while budget and waiting:
        request = waiting.first()
        if not join(request):
            return
        length = min(budget, request.num_left)
        yield request, length
        budget -= length
