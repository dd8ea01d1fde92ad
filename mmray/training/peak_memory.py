"""The most memory that this process has held."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that torch has allocated since the last call, which begins anew; elsewhere the most that
    the whole process has ever held in RAM."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
