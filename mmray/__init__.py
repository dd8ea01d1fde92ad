"""mmray prepares image-and-text data and trains vision-language models.

This package is the part that knows no Ray: images, tiling, exact lengths, packing, masks, the prepared-dataset
format, the schedule and its cursor, and the DeepSpeed engine. `pipelines` and `jobs`, in the checkout, put it on
a Ray cluster.
"""

from typing import TYPE_CHECKING

from mmray.base.version import __version__

if TYPE_CHECKING:
    from mmray.run.export.prompting import Prompt

__all__ = ["__version__", "prompt"]


def prompt(folder: str, *, trust_remote_code: bool = False) -> "Prompt":
    """Open a folder that `mmray export` wrote, to make model inputs of pages and text exactly as training made them.

    >>> inputs = mmray.prompt("out/model")("<image>", images=["page.png"])

    Raises UserError for another folder.
    """
    from mmray.run.export.prompting import Prompt  # transformers and torch, which importing mmray does not need

    return Prompt(folder, trust_remote_code=trust_remote_code)
