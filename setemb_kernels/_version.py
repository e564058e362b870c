"""The one place of the version; the build and both packages read it from here."""

__version__ = "0.1.0"
