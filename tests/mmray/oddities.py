"""The odd rows of the shared data, as their makers had them: with links, which git keeps as text in some checkouts."""

import shutil
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "oddities" / "rows"
ODD_ROWS = _FOLDER if _FOLDER.is_dir() else None
"""None where the shared data is not here."""


def restored(name: str, target: Path) -> Path:
    """A copy of one case, where a file that holds a relative path and nothing else is a link again."""
    assert ODD_ROWS is not None
    root = target / name
    shutil.copytree(ODD_ROWS / name, root, symlinks=True)
    for path in (*root.parents, root):
        path.chmod(0o755) if path.is_relative_to(target) else None
    for path in sorted(root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 64:
            text = path.read_bytes().decode(errors="replace")
            if "\n" not in text and (text.startswith("../") or (path.parent / text).is_dir()):
                path.unlink()
                path.symlink_to(text)
    return root
