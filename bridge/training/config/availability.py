"""Settings that are part of the documented API and that this version does not carry out."""

from __future__ import annotations

NOT_AVAILABLE: frozenset[str] = frozenset()
"""Settings that may hold nothing but their default: another value is refused, never ignored."""
