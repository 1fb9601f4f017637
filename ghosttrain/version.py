"""The version, for the package and for whoever writes it down."""

__version__ = "0.1.0"
