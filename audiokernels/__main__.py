"""python -m audiokernels: which kernel serves which op here, and the facts of the build."""

from audiokernels import __version__
from audiokernels.backends import backends, facts


def main() -> None:
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


if __name__ == "__main__":
    main()
