"""Makes micro-batches from bins.

`render` decodes pages, `micro_batch` joins them with tokens and labels, `plan` says which bins each rank gets.
"""

from mmray.batches.micro_batch import MicroBatch, Place
from mmray.batches.plan import BatchMaker, BatchPlan

__all__ = ["BatchMaker", "BatchPlan", "MicroBatch", "Place"]
