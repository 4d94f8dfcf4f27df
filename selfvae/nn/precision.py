"""Which numbers the networks compute in. Likelihoods are always computed in float32 or float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # settings name these types, and the command line explains settings without torch
    import torch

__all__ = ["Precision", "Resolved", "autocast", "resolve"]

Resolved = Literal["32-true", "bf16-mixed"]
Precision = Literal["auto", "32-true", "bf16-mixed"]


def resolve(precision: Precision, device: str | None = None) -> Resolved:
    """What "auto" means: bf16-mixed where that is faster, 32-true elsewhere.

    device: its type, e.g. "cpu"; None: the one that training takes.

    A processor without bfloat16 instructions converts every number, and takes ten times as long.
    """
    if precision != "auto":
        return precision
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        capable: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))
    else:
        fast = False
    return "bf16-mixed" if fast else "32-true"


def autocast(device: torch.device, precision: Resolved) -> torch.autocast:
    """A context in which the networks compute in bfloat16, if so wished; likelihoods stay in float32.

    Every parameter of a likelihood gives a normalised one, so that a bound found so is a bound all the
    same: of the model with rounded outputs.
    """
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
