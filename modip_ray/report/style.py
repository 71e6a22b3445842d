"""The report page's style: light and dark by the reader's setting, one column on a phone."""

CSS = """
:root {
  color-scheme: light dark;
  --bg: #f5f6f8; --card: #ffffff; --ink: #1b1f24; --muted: #5b6470; --grid: #dfe3e8; --wait: #c2410c; --good: #1a7f37; --bad: #b42318;
  --mpc: #2563c9; --policy: #c8640a; --bc: #4b5563; --data: #8a7a1f; --pre: #7a5fb5; --on: #0c857a;
  --seq1: #8ccac2; --seq2: #5fb0a6; --seq3: #36958a; --seq4: #137a6f; --seq5: #05524a;
  --run1: #2563c9; --run2: #c8640a; --run3: #1a7f37; --run4: #a3319a; --run5: #8a7a1f; --run6: #0c857a; --run7: #b42318; --run8: #5b6470;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #0f1215; --card: #181c21; --ink: #e7eaee; --muted: #9aa5b1; --grid: #2e353d; --wait: #f0815a; --good: #57c979; --bad: #ff8d80;
    --mpc: #74a9ff; --policy: #f2a154; --bc: #b6c0cb; --data: #cdbb5a; --pre: #b39df0; --on: #45c4b5;
    --seq1: #2c756c; --seq2: #389488; --seq3: #48b3a5; --seq4: #74d1c4; --seq5: #b5f1e8;
    --run1: #74a9ff; --run2: #f2a154; --run3: #57c979; --run4: #e58bdc; --run5: #cdbb5a; --run6: #45c4b5; --run7: #ff8d80; --run8: #9aa5b1;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 16px 0 4px; }
.run-title { font-size: 1.35rem; margin: 36px 0 0; }
h4 { font-size: .92rem; font-weight: 600; line-height: 1.3; margin: 0 0 3px; }
p { margin: 4px 0 10px; }
.note, .missing { color: var(--muted); font-size: .92rem; }
.missing { border-left: 3px solid var(--grid); padding-left: 10px; }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace; font-size: .88em; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 16px 18px; margin-top: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 16px; }
.tile { background: var(--card); border: 1px solid var(--grid); border-top: 4px solid var(--c); border-radius: 10px; padding: 10px 14px; }
.tile b { display: block; font-size: 1.65rem; line-height: 1.25; }
.tile span { color: var(--muted); font-size: .86rem; display: block; }
.tile .up { color: var(--good); }
.tile .down { color: var(--bad); }
.badge {
  display: inline-block; padding: 0 9px; border: 1px solid currentColor; border-radius: 99px; color: var(--good); font-size: .8rem; vertical-align: 4px;
}
.badge.open { color: var(--wait); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px 28px; }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); }
.charts h3 { margin-top: 6px; }
.charts + .charts, .scroll + .charts { margin-top: 20px; }
figure { margin: 0; }
figure svg { display: block; width: 100%; max-width: 500px; height: auto; }
figcaption { color: var(--muted); font-size: .86rem; }
.legend { font-size: .92rem; margin: 8px 0; }
.legend span { display: inline-block; margin-right: 18px; }
.legend .line { display: inline-block; width: 24px; margin-right: 7px; vertical-align: middle; }
.scroll { overflow-x: auto; }
.charts .scroll { max-height: 420px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; font-size: .84rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small { color: var(--muted); display: block; }
.left th { text-align: left; }
.left td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.left td:first-child { width: 34%; min-width: 8em; }
.differ td:first-child { min-width: 11em; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; background: var(--c); margin-right: 7px; }
details { margin-top: 8px; }
summary { cursor: pointer; color: var(--muted); }
.time td { padding-top: 3px; padding-bottom: 3px; }
.time td:first-child { width: 22%; }
.time .bar { width: 42%; min-width: 60px; }
.bar div { height: 11px; border-radius: 3px; background: var(--on); min-width: 1px; }
.bar .wait { background: repeating-linear-gradient(135deg, var(--wait) 0 5px, color-mix(in srgb, var(--wait) 55%, transparent) 5px 9px); }
.bar .rest { background: var(--grid); }
.bar span { display: flex; gap: 1px; }
.charts .legend { margin: 0 0 2px; font-size: .86rem; }
.run { margin-top: 16px; }
.run > summary { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 12px 18px; color: var(--ink); font-weight: 600; }
.incidents { font-size: .92rem; padding-left: 1.2em; margin: 6px 0; overflow-wrap: anywhere; }
.waiting { color: var(--wait); }
video { width: 100%; max-width: 760px; border-radius: 8px; background: #000; }
@media (max-width: 600px) {
  main { padding: 14px 10px 36px; }
  section { padding: 13px 12px; }
  h1 { font-size: 1.35rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile b { font-size: 1.35rem; }
  .narrow-hide { display: none; }
  th, td { padding: 5px 6px; }
  .runs td small, .names { white-space: normal; }
  .names { min-width: 84px; }
  .roles .bar { min-width: 44px; }
  .time td { font-size: .9rem; }
}
"""
