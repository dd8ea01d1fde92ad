"""Compiled loops work where nothing can be written."""

import subprocess
import sys
from pathlib import Path

import mmray

SCRIPT = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []  # as where neither the source's folder nor a home can be written
from mmray.base.compiled import compiled

@compiled()
def total(count):
    whole = 0
    for number in range(count):
        whole += number
    return whole

print(total(5), len(total.signatures), total.stats.cache_path)
"""


def test_without_a_place_for_numba_s_cache_loops_are_compiled_all_the_same():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=Path(mmray.__file__).parents[2], check=True
    )
    assert done.stdout.split() == ["10", "1", "None"], "compiled, and cached nowhere"
