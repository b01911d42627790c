"""HTML -> text."""

from __future__ import annotations

from typing import Any

# Elements that stand on their own lines. All others (links, bold, ...) are part of the text around
# them.
BLOCKS = frozenset(
    "blockquote body dd div dl dt h1 h2 h3 h4 h5 h6 hr li ol p pre table td th tr ul".split()  # noqa: SIM905
)


def strip_html(html: str) -> str:
    """Return the text of the HTML: blocks separated by a blank line, inline markup dropped, code
    kept inside <code>...</code>.

    The original code lost whatever was nested in a paragraph (links, bold), lists and quotes.

    >>> strip_html("<p>Use <b>this</b>:</p><pre><code>x = 1\\n</code></pre>")
    'Use this:\\n\\n<code>x = 1\\n</code>'
    """
    from selectolax.lexbor import LexborHTMLParser

    blocks: list[str] = []
    inline: list[str] = []

    def end_block() -> None:
        if text := "".join(inline).strip():
            blocks.append(text)
        inline.clear()

    # a stack, for quotes may be nested deeper than Python recurses
    stack: list[Any] = [LexborHTMLParser(html).body]
    while stack:
        node = stack.pop()
        if node is None:
            end_block()
        elif node.tag == "-text":
            inline.append(node.text_content or "")
        elif node.tag == "code":
            inline.append(f"<code>{node.text()}</code>")
        elif node.tag == "br":
            inline.append("\n")
        elif node.tag not in ("script", "style"):
            if node.tag in BLOCKS:
                end_block()
                stack.append(None)  # comes up once all its children have
            stack.extend(reversed(list(node.iter(include_text=True))))
    end_block()
    return "\n\n".join(blocks)
