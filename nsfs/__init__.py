"""nsfs: a filesystem in which a Linux container is a directory."""

__version__ = "0.1.0"
