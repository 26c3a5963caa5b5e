"""Run golden cases: files or folders, known or never seen before.

    python -m tests.golden                     the copies in this repository
    python -m tests.golden FILE_OR_FOLDER...   any others

One line per case with its largest error as a share of the tolerance; exit code 1 if any case failed.
"""

import argparse
import sys
from pathlib import Path

from tests.runners import collect, run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path(__file__).parent])
    parser.add_argument("--verbose", action="store_true", help="show every compared tensor")
    options = parser.parse_args(arguments)
    counts = {"passed": 0, "failed": 0, "later": 0}
    for path in collect(options.paths):
        outcome = run(path)
        counts[outcome.status] += 1
        print(outcome.line())
        details = outcome.details(only_failures=not options.verbose)
        if details:
            print(details)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['later']} later")
    return 1 if counts["failed"] or not sum(counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
