"""The command ``tightfit``, which comes with the package."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command with the process's arguments, and returns the exit status."""
    from . import _native

    return _native.main(["tightfit", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
