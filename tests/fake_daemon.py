"""`dsd` with the fake worker in place of the model: the real command line, node, API and scheduler.

FAKE_WORKER='{"step_s": 0.02}' python -P tests/fake_daemon.py serve DIR --port 0
"""

import sys
from pathlib import Path
from typing import Any

from dsd.daemon import cli, node

WORKER = (sys.executable, "-P", str(Path(__file__).with_name("fake_worker.py")))


class FakeNode(node.Node):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, worker_command=WORKER)


if __name__ == "__main__":
    node.Node = FakeNode  # type: ignore[misc]
    cli.main()
