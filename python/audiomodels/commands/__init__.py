"""The commands of `audiokernels`, each a dataclass of its options; cli.py runs them."""
