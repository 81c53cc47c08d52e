"""Which device to train on, and what people call it."""

import torch

from regtune.errors import RegtuneError


def find_device(name: str) -> torch.device:
    """Return a device by PyTorch's name, or the best with ``auto``; raise RegtuneError for none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RegtuneError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def describe(device: torch.device) -> str:
    """Return the name of a device, as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)
