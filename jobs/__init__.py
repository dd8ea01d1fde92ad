"""What a person runs. Here only: one line where a package is missing, before any module of a job asks for it."""

import importlib.util
import sys

if _missing := [name for name in ("typer", "torch", "ray") if importlib.util.find_spec(name) is None]:
    print(
        f"error: {' and '.join(_missing)} not installed in {sys.executable}; in the checkout, for this Python: "
        "pip install -c constraints.txt -e '.[cluster]'",
        file=sys.stderr,
    )
    sys.exit(2)
