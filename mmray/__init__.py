"""mmray prepares image-and-text data and trains vision-language models.

This package is the part that knows no Ray: images, tiling, exact lengths, packing, masks, the prepared-dataset
format, the schedule and its cursor, and the DeepSpeed engine. `pipelines` and `jobs`, in the checkout, put it on
a Ray cluster.
"""

__version__ = "0.1.0"
