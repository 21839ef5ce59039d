"""PerturbDiff: functional diffusion models of single-cell perturbation responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["PerturbDiff", "__version__", "finetune"]

if TYPE_CHECKING:
    from perturbdiff.finetuning import finetune
    from perturbdiff.pretrained import PerturbDiff


def __getattr__(name: str) -> Any:
    # Lazy, so that `perturbdiff --help` does not wait for torch.
    if name == "PerturbDiff":
        from perturbdiff.pretrained import PerturbDiff

        return PerturbDiff
    if name == "finetune":
        from perturbdiff.finetuning import finetune

        return finetune
    raise AttributeError(f"module 'perturbdiff' has no attribute {name!r}")
