"""The `audiokernels` command, also `python -m audiomodels`: what it does is in cli.py."""

import os

# Threads that sleep at a barrier instead of spinning: on a busy machine, training is 4 times as fast (measured).
# OpenMP reads this once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Entry point of the command."""
    from audiomodels import cli

    cli.main()


if __name__ == "__main__":
    main()
