"""Patterns that say which names a certificate may be for: DNS names, and URIs as SPIFFE has them.

`*` in a pattern stands for any one part of a name between dots (of a URI: slashes), and a placeholder such as
`{node}` for the value filled in. Everything else stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


def accepting(pattern: str, filled_in: Mapping[str, str] | None = None) -> re.Pattern[str]:
    """The regular expression that a name must match as a whole (`fullmatch`).

    Args:
        filled_in: values by placeholder, braces included (`{node}`); a value stands for itself, even with a `*` in it.
    """
    # DNS names are the same in either case (RFC 4343), those of SPIFFE are not. A part of a DNS name has no slash, so
    # that no URI is taken for one.
    is_uri = "://" in pattern
    parts = {"*": "[^/]+" if is_uri else "[^./]+"}
    for name, value in (filled_in or {}).items():
        parts[name] = re.escape(value)
    split = "|".join(map(re.escape, parts))
    text = "".join(parts.get(part) or re.escape(part) for part in re.split(f"({split})", pattern))
    return re.compile(text, re.NOFLAG if is_uri else re.IGNORECASE | re.ASCII)
