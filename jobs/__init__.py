"""The commands that a person runs.

This module does what must come before any module of a job imports a package: one line where a package is missing, and
the environment that Ray reads when it is imported.
"""

import importlib.util
import os
import sys

if _missing := [name for name in ("typer", "torch", "ray") if importlib.util.find_spec(name) is None]:
    print(
        f"error: {' and '.join(_missing)} not installed in {sys.executable}; in the checkout, for this Python: "
        "pip install -c constraints.txt -e '.[cluster]'",
        file=sys.stderr,
    )
    sys.exit(2)

os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "killed by `ray.kill`|actor is temporarily unavailable: .*(Socket closed|Connection reset)|^Raylet is terminated",
)
"""Pattern of messages that Ray leaves out of a driver's output. When a job is interrupted, Ray Data kills its actors,
and Ray would report each of their tasks as failed; by its closed connection, where Ray does not know yet who killed the
actor. A process or node that dies by itself has a line of its own. Of a node whose Ray is killed Ray would also show 20
lines of its log."""
