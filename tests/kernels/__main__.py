"""
Run the marked tests under the kernels of releases: ``python -m tests.kernels RELEASE ... -- PYTEST-ARGUMENT ...``.

The exit status is 0 when all of them passed on each release, and 1 otherwise.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from tests.kernels.image import image
from tests.kernels.machine import Ended, run
from tests.machines.debian import REPOSITORY

_MARKED = ("-m", "per_kernel")
_IN_THE_MACHINE = ("-q", "-n", "2", "--dist", "loadfile", "-o", "timeout=1200", *_MARKED)


def main(releases: Sequence[str], arguments: Sequence[str]) -> int:
    """Run the tests on one release after the other, and print how long each took."""
    modules = marked_modules(arguments)
    failed = []
    for release in releases:
        made = image(release)
        begin = time.monotonic()
        print(f"{release}:", flush=True)
        try:
            status = run(made, (*_IN_THE_MACHINE, *arguments, *modules))
        except Ended as error:
            print(error, file=sys.stderr)
            status = 1
        if status:
            failed.append(release)
        print(f"{release}: {'failed' if status else 'passed'}, {time.monotonic() - begin:.0f} s", flush=True)
    return 1 if failed else 0


def marked_modules(arguments: Sequence[str]) -> list[str]:
    """
    Return the test modules with a marked test: to find out here is quicker than to import all of them in a machine.

    :raise subprocess.CalledProcessError: When there is none, or a module cannot be imported.
    """
    command = (sys.executable, "-m", "pytest", "--collect-only", "-qq", *_MARKED, *arguments, "tests/netns")
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout
    return sorted({line.partition(":")[0] for line in listed.splitlines() if line.startswith("tests/")})


if __name__ == "__main__":
    given = sys.argv[1:]
    middle = given.index("--") if "--" in given else len(given)
    sys.exit(main(given[:middle], given[middle + 1 :]))
