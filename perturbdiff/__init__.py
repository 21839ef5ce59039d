"""PerturbDiff: functional diffusion models of single-cell perturbation responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perturbdiff._version import __version__

__all__ = ["PerturbDiff", "__version__", "finetune"]

if TYPE_CHECKING:
    from perturbdiff.model import PerturbDiff
    from perturbdiff.training.finetune import finetune


def __getattr__(name: str) -> Any:
    # Lazy, so that `perturbdiff --help` does not wait for torch.
    if name == "PerturbDiff":
        from perturbdiff.model import PerturbDiff

        return PerturbDiff
    if name == "finetune":
        from perturbdiff.training.finetune import finetune

        return finetune
    raise AttributeError(f"module 'perturbdiff' has no attribute {name!r}")
