"""The display of a result in a notebook: its figure, and its report below."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, Protocol

    class Shown(Protocol):
        """A result that can be drawn and reported."""

        def plot(self) -> Any:
            """Draw the result."""

        def report(self) -> Any:
            """Describe the result in words."""


def in_notebook(result: Shown) -> str:
    """HTML with the picture of a result and its report; without matplotlib, a hint instead of the picture."""
    try:
        picture = str(result.plot()._repr_html_())
    except ImportError as error:
        picture = f"<p>{html.escape(str(error))}</p>"
    return picture + str(result.report()._repr_html_())
