"""How far long work is. The commands show it as loading does; see `bridge.training.progress`."""

from bridge.training.progress import Progress, bar_line, progress_line

__all__ = ["Progress", "bar_line", "progress_line"]
