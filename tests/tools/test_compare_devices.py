"""Comparing answers: what is a difference, and how close it was."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from dsd.ipc.messages import LogprobEntry
from dsd.tools.compare_devices import compare, main
from dsd.tools.local_engine import Answer

TINY = Path(__file__).resolve().parents[2] / "tools/tiny/dsd-tiny"


def answer(*token_ids: int, margin: float = 1.0) -> Answer:
    entry = LogprobEntry(-0.1, 1, ((token_ids[0], -0.1), (0, -0.1 - margin)))
    return Answer(list(token_ids), [entry] * len(token_ids))


def test_first_differences_are_counted_by_their_margin() -> None:
    wanted = [answer(1, 2, 3), answer(1, 2, 3, margin=0.04), answer(1, 2, 3, margin=0.3)]
    found = compare(wanted, [answer(1, 2, 3), answer(1, 9, 9), answer(7, 2, 3)])
    assert (found.same, found.harmless, found.harmful) == (1, 1, 1)
    assert found.tokens == 3 + 2 + 1
    assert found.margins == pytest.approx([0.04, 0.3])


def test_drafts_change_no_answer() -> None:
    arguments = [str(TINY), "--drafts", "2", "--prompts", "3", "--max-tokens", "8"]
    result = CliRunner().invoke(main, [*arguments, "--dtype", "float32", "--act-quant", "none"])
    assert result.exit_code == 0, result.output
    assert "with drafts: 24 tokens" in result.output
    assert "3 of 3 answers the same" in result.output
