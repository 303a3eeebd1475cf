"""How large a step may get while rows decode, so that none of them waits longer than the goal.

A decoding row has its next token when the step ends: its inter-token latency is the step's time.
That of a step with prompts in it is taken to be

    fixed  +  per_token * tokens  +  per_pair * pairs

tokens: of prompts, and one for each decode. pairs: over the prompts' tokens, how many are before
each. The three are fitted to the steps that were, those of late most. Pure: no clock.
"""

from collections.abc import Iterable, Sequence

from ..ipc.messages import Chunk, Step, StepOutput
from .prefill import StepLimit

MIN_MIXED_TOKENS = 2048
MIXED_SHARE = 4
"""Without a goal: a quarter of `max_num_tokens`, not less than 2,048; docs/architecture.md has the
reasons."""
START_TOKENS = 128
"""Twice as many are tried first: nothing is known yet."""
NUM_SPREADS = 4
"""The goal is for nearly every step, not for the mean one."""
MEMORY = 0.9
"""Weight of a step against a like one after it: about ten count."""
MAX_SURPRISE = 2.0
"""A step that takes longer than so many times the prediction counts as if it took just that: one
that was held up tells little, and a machine that became slower is believed within some steps."""
NUM_SWEEPS = 8
MIN_TOKEN_SHARE = 0.01
"""Of a step's time per token: at least so much is put down to the token itself, so that all work
can be counted in tokens."""


class StepTimes:
    """Least squares over relative errors, with no coefficient below zero.

    What a step tells is forgotten when steps like it come, not merely with time: while one long
    prompt is computed for hundreds of steps, what short ones cost is still known. The normal
    equations are solved by sweeps over the coordinates that begin at the last solution, so that
    what no step told (all had one length, say) stays as it was.
    """

    def __init__(self) -> None:
        self.per_token_us = 0.0
        self.per_pair_us = 0.0
        self.fixed_us = 0.0
        self.spread = 0.1
        """Mean relative error of the predictions of late."""
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3

    def predict(self, num_tokens: float, num_pairs: float) -> float:
        """Microseconds."""
        return self.fixed_us + self.per_token_us * num_tokens + self.per_pair_us * num_pairs

    def observe(self, num_tokens: float, num_pairs: float, time_us: float) -> None:
        assert num_tokens > 0 and num_pairs >= 0 and time_us > 0
        expected_us = self.predict(num_tokens, num_pairs) or time_us
        time_us = min(time_us, MAX_SURPRISE * expected_us)
        self.spread += (1 - MEMORY) * (abs(time_us / expected_us - 1) - self.spread)
        point = (num_tokens / time_us, num_pairs / time_us, 1 / time_us)  # times coefficients: 1
        self._forget(point)
        for i, row in enumerate(self._products):
            for j in range(3):
                row[j] += point[i] * point[j]
            self._targets[i] += point[i]
        self._solve()

    def _forget(self, point: Sequence[float]) -> None:
        """Takes 1 - MEMORY of what is known in the point's direction, and nothing of what is known
        across it. A solution of the equations stays one."""
        image = [_dot(row, point) for row in self._products]
        length = _dot(image, point)
        if length <= 0:
            return
        target = _dot(self._targets, point)
        for i, row in enumerate(self._products):
            share = (1 - MEMORY) * image[i] / length
            for j in range(3):
                row[j] -= share * image[j]
            self._targets[i] -= share * target

    def _solve(self) -> None:
        solution = [self.per_token_us, self.per_pair_us, self.fixed_us]
        for _ in range(NUM_SWEEPS):
            for i, row in enumerate(self._products):
                if row[i] > 0:
                    error = self._targets[i] - _dot(row, solution)
                    solution[i] = max(solution[i] + error / row[i], 0.0)
        self.per_token_us, self.per_pair_us, self.fixed_us = solution


class Pace:
    """The limit for steps in which rows decode: from the goal and from the steps that were."""

    def __init__(self, max_num_tokens: int, max_itl_ms: float) -> None:
        self.max_itl_ms = max_itl_ms
        """0: no goal."""
        self.times = StepTimes()
        self._max_num_tokens = max_num_tokens
        self._reach = float(START_TOKENS)
        """Work of the largest step with decodes so far; at most twice as much is tried."""
        self._least_per_token_us = 1.0

    def observe(self, step: Step, output: StepOutput) -> None:
        """A result has come. Steps of decodes alone say nothing: they are replayed graphs. Nor do
        those that wait for blocks from host memory."""
        if not step.chunks or step.restores or not output.compute_us:
            return
        num_decodes = len(step.decodes) // 4 * (1 + step.num_drafts)
        num_tokens = num_decodes + sum(chunk.num_tokens for chunk in step.chunks)
        num_pairs = _num_pairs(step.chunks)
        # A row that decodes was in the step before, so its client waits for the gap between too.
        time_us = output.compute_us + (output.idle_us if num_decodes else 0)
        self.times.observe(num_tokens, num_pairs, time_us)
        usual_us = self.times.predict(num_tokens, num_pairs)
        self._least_per_token_us = MIN_TOKEN_SHARE * usual_us / num_tokens
        if num_decodes:
            self._reach = max(self._reach, num_tokens + self._context_weight * num_pairs)

    @property
    def limit(self) -> StepLimit:
        if not self.max_itl_ms:
            return StepLimit(max(self._max_num_tokens // MIXED_SHARE, MIN_MIXED_TOKENS))
        times = self.times
        aim_us = 1000 * self.max_itl_ms / (1 + NUM_SPREADS * times.spread)
        work = (aim_us - times.fixed_us) / self._per_token_us
        return StepLimit(min(work, 2 * self._reach), self._context_weight)

    @property
    def _per_token_us(self) -> float:
        return max(self.times.per_token_us, self._least_per_token_us)

    @property
    def _context_weight(self) -> float:
        return self.times.per_pair_us / self._per_token_us


def _num_pairs(chunks: Iterable[Chunk]) -> float:
    return sum(chunk.num_tokens * (chunk.start + chunk.num_tokens / 2) for chunk in chunks)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return left[0] * right[0] + left[1] * right[1] + left[2] * right[2]
