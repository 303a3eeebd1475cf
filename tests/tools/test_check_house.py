"""The house rules hold, and the checker sees what breaks them."""

from pathlib import Path

import pytest

from dsd.tools import check_house


def test_house_keeps_its_rules() -> None:
    assert [problem for path in check_house.files() for problem in check_house.problems(path)] == []


@pytest.mark.parametrize(
    ("folder", "source", "expected"),
    [
        ("daemon", "import torch\n", "imports torch"),
        ("daemon", "from ..model.config import ModelConfig\n", "daemon may not"),
        ("ipc", "from ..daemon import engine\n", "ipc may not"),
        ("kernels", "from ..model import mla\n", "kernels may not"),
        ("model", "from ..ipc.channel import BlockingChannel\n", "only worker.py may"),
        ("model", "import pickle\n", "no code from data"),
        ("tools", "eval('1')\n", "no code from data"),
        ("tools", "torch.load(path)\n", "no code from data"),
        ("tools", "def f():\n" + "    x = 1\n" * 61, "f has 62 lines"),
        ("tools", "x = 1\n" * 451, "451 lines"),
    ],
)
def test_problems_broken_rule_is_named(
    folder: str, source: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_house, "ROOT", tmp_path)
    path = tmp_path / folder / "moe.py"
    path.parent.mkdir()
    path.write_text(source)
    assert any(expected in problem for problem in check_house.problems(path))
