"""Colours and layout of the HTML report."""

from __future__ import annotations

__all__ = ["COLOURS", "CSS"]

COLOURS = {
    "ours": ("#2563d9", "#6ea0ff"),
    "official": ("#d9730d", "#f0a04b"),
    "obstore": ("#1f8a5b", "#4cc38a"),
    "aiobotocore": ("#9a4bc0", "#c58be6"),
    "zarr-obstore": ("#0f8fa6", "#53c4d8"),
    "zarr-fsspec": ("#b8415f", "#f0819a"),
}
"""Colours by system, on light and on dark. Every plot also names the systems, in one order, for readers who cannot tell
colours apart."""


def _variables(which: int) -> str:
    return "".join(f"--{name}:{pair[which]};" for name, pair in COLOURS.items())


_LIGHT = f"""--page:#f6f7f9;--card:#fff;--ink:#171a21;--soft:#5b6372;--faint:#8a92a1;--line:#e3e6ec;--track:#f0f2f6;
--good:#1f8a5b;--good-soft:#e3f5ec;--bad:#c5303c;--bad-soft:#fdeaec;--shadow:0 1px 2px #1018280d,0 1px 3px #1018281a;
{_variables(0)}"""
_DARK = f"""--page:#0f1217;--card:#171b22;--ink:#e8ebf1;--soft:#a2abba;--faint:#727c8d;--line:#2a303b;--track:#20262f;
--good:#4cc38a;--good-soft:#12301f;--bad:#ff8088;--bad-soft:#3a1a1e;--shadow:none;{_variables(1)}"""

CSS = (
    f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}
"""
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1180px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;letter-spacing:-.02em;margin:0 0 4px;line-height:1.2}
h2{font-size:20px;letter-spacing:-.01em;margin:48px 0 14px}
h3{font-size:16px;margin:0}
p{margin:0}
.sub,.about{color:var(--soft)}
.about{margin:2px 0 0;font-size:14px;max-width:75ch}
.sizes{color:var(--faint);font-size:13px}
code{font:13px/1.4 ui-monospace,SFMono-Regular,Menlo,monospace;color:var(--soft);overflow-wrap:anywhere}
.badges{display:flex;flex-wrap:wrap;gap:8px;margin:18px 0 0}
.badge{padding:4px 12px;border-radius:99px;font-size:13px;font-weight:600;background:var(--track);color:var(--soft)}
.badge.good{background:var(--good-soft);color:var(--good)}
.badge.bad{background:var(--bad-soft);color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:12px}
.card,.panel{background:var(--card);border:1px solid var(--line);border-radius:12px;box-shadow:var(--shadow)}
.card{padding:14px 16px 12px;text-decoration:none;color:inherit;display:block}
.card:hover{border-color:var(--ours)}
.card .what{font-size:13px;color:var(--soft)}
.card .ratio{font-size:30px;font-weight:650;letter-spacing:-.03em;line-height:1.25}
.card .ratio.ahead{color:var(--ours)}
.card .ratio.behind{color:var(--official)}
.card .figures{font-size:12.5px;color:var(--faint)}
.panel{padding:20px 22px;margin:0 0 16px;scroll-margin-top:16px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:10px 36px;
margin:16px 0 4px;align-items:start}
figure{margin:0;min-width:0}
figcaption{font-size:12.5px;font-weight:600;color:var(--soft);margin:0 0 6px}
svg{display:block;width:100%;height:auto;max-width:620px;overflow:visible}
svg text{font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;dominant-baseline:central;fill:var(--ink);
font-variant-numeric:tabular-nums}
svg .name{fill:var(--ink)}
svg .value{font-weight:650}
svg .aside{font-weight:400;fill:var(--soft)}
svg .tick{font-size:11.5px;fill:var(--faint)}
svg .axis{font-size:11.5px;fill:var(--faint);dominant-baseline:auto}
svg .grid{stroke:var(--line);stroke-width:1;fill:none}
svg .base{stroke:var(--faint);stroke-width:1;fill:none}
svg .track{fill:var(--track)}
svg .whisker{stroke:var(--ink);stroke-width:1.2;fill:none;opacity:.65}
svg .line{fill:none;stroke-linejoin:round;stroke-linecap:round}
svg .mark{stroke:var(--card);stroke-width:1.2}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:12.5px;color:var(--soft);margin:0 0 8px}
.legend i{display:inline-block;width:14px;height:4px;border-radius:2px;margin-right:6px;vertical-align:middle}
.scroll{overflow-x:auto;margin:12px 0 0}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{padding:6px 8px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
th{font-weight:500;color:var(--faint);font-size:12.5px;border-top:0}
th:first-child,td:first-child{text-align:left;padding-left:0}
td.left{text-align:left;white-space:normal}
tr.ours td{font-weight:600}
td i{display:inline-block;width:9px;height:9px;border-radius:3px;margin-right:8px}
.ok{color:var(--good);font-weight:600}.missed{color:var(--bad);font-weight:600}
.trouble{margin:12px 0 0;padding:10px 14px;border-radius:8px;background:var(--bad-soft);color:var(--bad);
font-size:13.5px;
overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;margin:0;font-size:13.5px}
dt{color:var(--faint)}dd{margin:0;overflow-wrap:anywhere}
footer{color:var(--faint);font-size:13px;margin-top:32px;max-width:85ch}
@media(max-width:560px){main{padding:24px 14px}.panel{padding:16px}}
@media print{body{background:#fff}.panel{break-inside:avoid}}
"""
)
