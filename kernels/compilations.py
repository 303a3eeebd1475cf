"""Counts what Triton compiles in this process, where each compilation stalls who waits for it.

Compiled kernels are kept in the folder that TRITON_CACHE_DIR names. A warm start loads them from
there and compiles nothing; a process that serves, once warmed up, does neither.
"""

from typing import NamedTuple, Protocol

import triton


class Compilations(NamedTuple):
    """Of this process, since it imported this module."""

    compiled: int
    loaded: int
    """Found in the folder. A kernel's later launches in the same process count in neither."""


class _Listener(Protocol):
    def __call__(self, **compilation: object) -> None: ...


_found = Compilations(0, 0)


def compilations() -> Compilations:
    return _found


def _listen(others: _Listener | None) -> _Listener:
    """Counts, and passes on to who listened before."""

    def count(**compilation: object) -> None:
        global _found
        hit = bool(compilation["cache_hit"])
        _found = Compilations(_found.compiled + (not hit), _found.loaded + hit)
        if others is not None:
            others(**compilation)

    return count


triton.knobs.compilation.listener = _listen(triton.knobs.compilation.listener)
