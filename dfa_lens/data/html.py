"""How values show themselves in a notebook: a line of text and a table."""

from __future__ import annotations

import html
from typing import Any

#: Rows of a table; the rest is in ``to_frame()``.
MOST_ROWS = 10


def shown(title: str, frame: Any, *, index: bool = False) -> str:
    """HTML of a title and a pandas table, of which the first rows; names in either are escaped.

    Examples
    --------
    >>> import pandas as pd
    >>> from dfa_lens.data.html import shown
    >>> shown("a < b", pd.DataFrame({"node": ["m0"]})).splitlines()[0]
    '<p><code>a &lt; b</code></p>'
    """
    more = len(frame) - MOST_ROWS
    rest = f"<p>… and {more} more rows: <code>to_frame()</code></p>" if more > 0 else ""
    table = frame.head(MOST_ROWS).to_html(index=index, border=0, float_format=lambda value: f"{value:.3g}")
    return f"<p><code>{html.escape(title)}</code></p>\n{table}\n{rest}".rstrip()
