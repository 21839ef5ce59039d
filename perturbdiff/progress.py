"""The progress bar of all long work."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, what: str, unit: str, initial: int = 0, shown: bool = True) -> tqdm[Any]:
    """A tqdm bar on stderr; in a log file it writes a line now and then instead of redrawing one."""
    interactive = sys.stderr.isatty()
    return tqdm(
        disable=not shown,
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        unit_scale=unit == "cell",
        dynamic_ncols=interactive,
        mininterval=0.1 if interactive else 10,
        maxinterval=10,
    )
