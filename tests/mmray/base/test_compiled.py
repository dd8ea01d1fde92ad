"""Compiled loops work where nothing can be written."""

import subprocess
import sys
from pathlib import Path

import mmray

SCRIPT = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []  # as where neither the source's folder nor a home can be written
from mmray.packing.pack import pack_2d
print(pack_2d([3, 2, 4], [0, 0, 0], token_capacity=5, visual_capacity=1))
"""


def test_without_a_place_for_numba_s_cache_loops_are_compiled_all_the_same():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=Path(mmray.__file__).parents[2], check=True
    )
    assert sorted(map(sorted, eval(done.stdout))) == [[0, 1], [2]]
