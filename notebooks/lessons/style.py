"""The lessons' one visual language: a colour for each thing, on light and on dark paper, in SVG, HTML and matplotlib.

Every picture brings its own paper, which follows the reader's light or dark theme, so that ink and paper always fit. Colours
differ in lightness as well, and nothing is told by colour alone, so that pictures survive a black and white printer.
"""

from __future__ import annotations

from types import MappingProxyType

# name: (on light paper, on dark paper)
COLOURS = MappingProxyType(
    {
        "paper": ("#ffffff", "#14181d"),
        "ink": ("#1c2128", "#e3e8ee"),
        "quiet": ("#5c6773", "#98a3b0"),  # labels, axes
        "line": ("#c9d1d9", "#3b434d"),  # borders of cells, grids
        "e": ("#1f6fb2", "#5aa9e6"),  # token embeddings
        "c": ("#d98200", "#f0a83a"),  # classifier
        "z": ("#7b52ab", "#b592e0"),  # logits, and the sums that become logits
        "g": ("#b5446e", "#e683a8"),  # the gradient of the loss with respect to the logits, and what is made of it
        "survivor": ("#1a8a5f", "#4cc495"),  # what the filter keeps
        "row": ("#4d6a7d", "#9db8c9"),  # what is kept for each token: max, sum
        "thread": ("#30363d", "#c8d1da"),
        "trouble": ("#cf222e", "#ff7b72"),  # races, wrong values
    }
)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def light(name: str) -> str:
    """The colour on light paper."""
    return COLOURS[name][0]


def _variables(which: int) -> str:
    return "".join(f"--{name}:{pair[which]};" for name, pair in COLOURS.items())


def css(scope: str, *, in_page: bool = False) -> str:
    """Rules for a picture within a CSS scope: `.ink` and so on are text colours, `.f-e` fills, `.l-e` lines.

    Values come twice, as a plain light colour first, for programs that know no CSS variables. In a page, the page's own theme
    (JupyterLab's, Sphinx's) decides before the browser's does.
    """
    rules = [f"{scope}{{{_variables(0)}}}", f"@media (prefers-color-scheme:dark){{{scope}{{{_variables(1)}}}}}"]
    if in_page:
        for which, themes in (
            (0, ('[data-jp-theme-light="true"]', '[data-theme="light"]')),
            (1, ('[data-jp-theme-light="false"]', '[data-theme="dark"]', ".vscode-dark")),
        ):
            rules.append(",".join(f"{theme} {scope}" for theme in themes) + f"{{{_variables(which)}}}")
    rules.append(f"@media print{{{scope}{{{_variables(0)}}}}}")
    for name, (on_light, _) in COLOURS.items():
        rules.append(f"{scope} .f-{name}{{fill:{on_light};fill:var(--{name})}}")
        rules.append(f"{scope} .l-{name}{{stroke:{on_light};stroke:var(--{name})}}")
    rules.append(f"{scope} text{{font-family:{FONT};font-size:11px;fill:{light('ink')};fill:var(--ink)}}")
    rules.append(f"{scope} text.quiet{{fill:{light('quiet')};fill:var(--quiet)}}")
    rules.append(f"{scope} text.small{{font-size:9px}}{scope} text.tiny{{font-size:7.5px}}{scope} text.bold{{font-weight:600}}")
    rules.append(f"{scope} text.mono{{font-family:{MONO}}}")
    for name in ("e", "c", "z", "g", "survivor", "row", "trouble"):
        rules.append(f"{scope} text.{name}{{fill:{light(name)};fill:var(--{name})}}")
    return "".join(rules)
