"""Versions that go into files."""

from importlib.metadata import PackageNotFoundError, version

# The PEFT whose layout the adapters follow (its loader warns about configs written by a newer one).
PEFT_VERSION = "0.15.0"

try:
    VERSION = version("deltaw")
except PackageNotFoundError:  # run from a checkout that was never installed
    VERSION = "0+unknown"
