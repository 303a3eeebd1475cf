"""Holds the house to its rules: who may import whom, and how long files and functions get.

python -m dsd.tools.check_house
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("daemon", "ipc", "kernels", "model", "tools")
MAY_IMPORT = {
    "ipc": set(),
    "kernels": set(),
    "model": {"kernels", "ipc"},
    "daemon": {"ipc"},
    "tools": set(FOLDERS),
}
"""Folders of ours that a folder may import, itself aside."""
IPC_IN_MODEL = {
    "worker.py", "build.py", "runner.py", "rehearsal.py", "chunks.py", "rows.py", "sampler.py",
}  # fmt: skip
"""Only the files between the wire and the model know the messages; layers do not."""
CHANNEL_IN_MODEL = {"worker.py"}
"""Only the process main opens sockets."""
NO_TORCH = ("daemon", "ipc")
FORBIDDEN = {"torch", "triton", "transformers", "safetensors"}
NO_CODE_FROM_DATA = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {"recv_pyobj", "send_pyobj"}
FORBIDDEN_LOADS = {("torch", "load"), ("yaml", "load"), ("np", "load"), ("numpy", "load")}
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60


def files() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def problems(path: Path) -> Iterator[str]:
    """What is wrong with one file, a line each."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    name = path.relative_to(ROOT)
    if (lines := text.count("\n")) > MAX_FILE_LINES:
        yield f"{name}: {lines} lines; at most {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for problem in _import_problems(path, node):
                yield f"{name}:{node.lineno}: {problem}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines"
        elif isinstance(node, ast.Call) and (called := _forbidden(node)):
            yield f"{name}:{node.lineno}: calls {called}: no code from data"


def _forbidden(node: ast.Call) -> str:
    """The name of what is called, if it makes code of data."""
    function = node.func
    if isinstance(function, ast.Name):
        return function.id if function.id in FORBIDDEN_CALLS else ""
    if not isinstance(function, ast.Attribute):
        return ""
    owner = function.value.id if isinstance(function.value, ast.Name) else ""
    is_load = (owner, function.attr) in FORBIDDEN_LOADS
    return function.attr if is_load or function.attr in FORBIDDEN_METHODS else ""


def _import_problems(path: Path, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    folder = path.relative_to(ROOT).parts[0]
    for module in _modules(path, node):
        parts = module.split(".")
        if parts[0] in NO_CODE_FROM_DATA:
            yield f"imports {parts[0]}: no code from data"
        if folder in NO_TORCH and parts[0] in FORBIDDEN:
            yield f"imports {parts[0]}: {folder} never does"
        if parts[0] != "dsd" or len(parts) < 2 or parts[1] not in FOLDERS:
            continue
        if parts[1] != folder and parts[1] not in MAY_IMPORT[folder]:
            yield f"imports {module}: {folder} may not"
        if folder == "model" and parts[1] == "ipc":
            allowed = CHANNEL_IN_MODEL if parts[2:3] == ["channel"] else IPC_IN_MODEL
            if path.name not in allowed:
                yield f"imports {module}: only {', '.join(sorted(allowed))} may"


def _modules(path: Path, node: ast.Import | ast.ImportFrom) -> list[str]:
    """Absolute names; ours begin with `dsd`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not node.level:
        return [node.module or ""]
    package = ["dsd", *path.relative_to(ROOT).parts[:-1]]
    base = package[: len(package) - node.level + 1]
    if node.module:
        return [".".join([*base, node.module])]
    return [".".join([*base, alias.name]) for alias in node.names]


def main() -> None:
    """Prints every problem; exits with 1 if there is one."""
    found = [problem for path in files() for problem in problems(path)]
    for problem in found:
        print(problem)
    if found:
        sys.exit(1)
    print(f"{sum(1 for _ in files())} files keep the rules")


if __name__ == "__main__":
    main()
