"""Where padding puts new channels, by name. It imports nothing: the command line's help names them too."""

from typing import Literal

Layout = Literal["interleave", "append", "split"]
DEFAULT_LAYOUT: Layout = "split"
"""With which padded models quantize best (``docs/numerics.md``)."""
