"""python -m audiokernels: which kernel serves which op here, and the facts of the build; --check: are they right?"""

import argparse
import sys

from audiokernels import __version__
from audiokernels.backends import backends, facts


def main(arguments: list[str] | None = None) -> int:
    """Print it all; 1 if a check fails. arguments: of the command line, by default those of this process."""
    parser = argparse.ArgumentParser(prog="python -m audiokernels", description="Which kernel serves which op here.")
    text = "also run every op here, on the CPU and on each GPU, and compare it with plain torch"
    parser.add_argument("--check", action="store_true", help=text)
    options = parser.parse_args(arguments)
    print(f"audiokernels {__version__}\n")
    table = backends()
    width = max(len("op"), *map(len, table)) if table else 2
    print(f"{'op':{width}}  {'device':6}  implementation")
    for op, devices in table.items():
        for device, implementation in devices.items():
            print(f"{op:{width}}  {device:6}  {implementation}")
    print()
    width = max(map(len, facts()))
    for name, value in facts().items():
        print(f"{name:{width}}  {value}")
    return self_check() if options.check else 0


def self_check() -> int:
    """Print a line a case as it ends; 1 if one is wrong."""
    from audiokernels.self_check import check

    print("\nlargest error against plain torch in float32, of what is allowed:")
    wrong = 0
    for result in check():
        print(result, flush=True)
        wrong += not result.right
    print(f"\n{wrong} wrong" if wrong else "\nall right")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
