"""Removes what a killed process has left half written in a run's folder."""

import pathlib
import re
import shutil

# Of `hf.save_pretrained` (a folder beside the export, and the export before it) and of files that are written whole.
_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<kind>[0-9a-f]{32}|[0-9a-f]{32}\.replaced|partial)")


def remove(run_dir: pathlib.Path) -> list[str]:
    """Removes partial exports and files; hold the run's lock meanwhile.

    An earlier export that a killed one had put aside goes back to its place, if that is empty.

    Returns:
      The names that were removed or put back.
    """
    names = []
    for path in sorted(run_dir.glob(".*"), key=lambda path: not path.name.endswith(".replaced")):
        if (match := _PARTIAL.fullmatch(path.name)) is None:
            continue
        names.append(path.name)
        if match["kind"].endswith("replaced") and not path.with_name(match["name"]).exists():
            path.rename(path.with_name(match["name"]))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return names
