"""The corpus that every table is made from: sound from Debian and PyPI packages, split by meaning."""
