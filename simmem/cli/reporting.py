"""What was found, shown again: `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    document: Annotated[Path, typer.Argument(
        metavar="PLAN|SEARCH", help="What `simmem plan --out` or `simmem search --json` wrote.")],
    html: Annotated[Path | None, typer.Option(
        help="Write one page there that opens in any browser, without a network.")] = None,
) -> None:
    """Show a plan or a search that was written down: as text, or as one page with what-ifs, timeline and evidence."""
    from simmem.planner.document import Plan
    from simmem.report.html.reading import check_plan, read_document

    if html is None:
        found = read_document(document)
        if isinstance(found, Plan):
            from simmem.report.plan import print_plan
            from simmem.spec.device import load_device

            device = load_device(found.device)
            check_plan(found, device, file=str(document))
            print_plan(found, device)
        else:
            from simmem.report.search import print_search

            print_search(found)
        return
    from simmem.report.files import check_writable, write_text

    check_writable(html, inputs=(document,))
    found = read_document(document)
    if isinstance(found, Plan):
        from simmem.report.html.plan import plan_page

        text = plan_page(found, document)
    else:
        from simmem.report.html.search import search_page

        text = search_page(found, document)
    write_text(html, text)
