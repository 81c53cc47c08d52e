"""How many lanes a device takes."""

import torch

CPU_LANES = 16
"""Beyond this many, more lanes no longer raise trial-epochs a second on a CPU (measured)."""

CUDA_LANES = 128
BYTES_PER_LANE = 256 * 2**20
"""Room for a lane's weights, moments, best copy and activations; ample for millions of weights."""


def default_lanes(device: torch.device) -> int:
    """Return a number of lanes that suits ``device`` without knowing the model."""
    if device.type != "cuda":
        return CPU_LANES
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(1, min(CUDA_LANES, free_bytes // BYTES_PER_LANE))
