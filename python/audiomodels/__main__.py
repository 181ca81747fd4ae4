"""The `audiokernels` command, also `python -m audiomodels`: what it does is in cli.py."""

import os


def main() -> None:
    # Threads that sleep at a barrier, not spin: training on a busy machine is 4 times as fast (measured). torch reads
    # this once, when it is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from audiomodels import cli

    cli.main()


if __name__ == "__main__":
    main()
