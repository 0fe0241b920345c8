"""How do data, a style and scripts become one page that asks for nothing and runs nothing but itself?

The policy of the page allows the one style and the one script by their digests, and no connection, picture, frame or
form. Data is JSON in an element that no browser runs, without the letters that could end it; the scripts put it into
the page as text alone.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from simmem import __version__

__all__ = ["page", "plain_json"]

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta name="generator" content="simmem {version}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main id="main"><h1>{title}</h1><noscript><p>{without}</p></noscript></main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
_NEVER_IN_TEXT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(title: str, data: Mapping[str, Any], scripts: Sequence[str], without: str) -> str:
    """The page.

    scripts : names of files beside this module that run after "page.js", one after the other.
    without : a sentence for those whose browser runs no scripts.
    """
    style = _beside("page.css")
    script = "(() => {\n\"use strict\";\n" + "\n".join(map(_beside, ("page.js", *scripts))) + "\n})();\n"
    title = html.escape(title).encode("utf-8", "replace").decode()  # JSON may hold half of a letter
    policy = (f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
              "connect-src 'none'; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'")
    return _PAGE.format(policy=policy, version=__version__, title=title, style=style,
                        without=html.escape(without), data=plain_json(data), script=script)


def plain_json(data: Mapping[str, Any]) -> str:
    """JSON in ASCII without a letter that HTML knows; what is not finite is null."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    for letter, instead in _NEVER_IN_TEXT.items():  # JSON has them in strings alone
        text = text.replace(letter, instead)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # false for NaN too
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _beside(name: str) -> str:
    return files(__package__ or "").joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
