"""Style and behaviour of report.html; nothing is loaded from elsewhere."""

STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfa;--ink:#1c1e21;--soft:#5b6068;--line:#e2e2dd;--wash:#f3f3ef;
--accent:#0b5fa5;--strong:60%;--checkpoint:#0072b2;--graph:#c25100;--engine:#a03f77;--bundle:#007d5a}
@media screen and (prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e8e8e4;--soft:#a0a6ae;
--line:#2d3136;--wash:#1d2024;--accent:#7cc0f5;--strong:45%;--checkpoint:#56b4e9;--graph:#f0954a;--engine:#dd93bd;--bundle:#3cc79b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%;overflow-wrap:anywhere}
main{max-width:1040px;margin:0 auto;padding:56px 24px 72px}
h1{font-size:2.1rem;line-height:1.15;letter-spacing:-.02em;margin:.15em 0 .5em;font-weight:650}
h2{font-size:1.2rem;letter-spacing:-.01em;margin:3.2rem 0 .9rem;font-weight:650}
h3{font-size:.95rem;margin:1.6rem 0 .5rem;font-weight:650}
p{max-width:68ch;margin:.5em 0}
.eyebrow{color:var(--soft);font-size:.85rem;margin:0}
.finding{font-size:1.18rem;line-height:1.5;max-width:60ch}
.note,figcaption{color:var(--soft);font-size:.84rem;line-height:1.5;max-width:84ch}
figure{margin:0}
svg{display:block;width:100%;height:auto;font-family:inherit}
svg.narrow{display:none}
svg text{fill:var(--soft);font-size:12px}
svg .name{fill:var(--ink);font-size:12.5px;font-weight:550;paint-order:stroke;stroke:var(--paper);stroke-width:4px;
stroke-linejoin:round}
svg .axis,svg .title{fill:var(--ink);font-size:12px;font-weight:600}
svg .tick{font-variant-numeric:tabular-nums;font-size:11.5px}
svg .grid{stroke:var(--line);stroke-width:1}
svg .rule{stroke:var(--soft);stroke-width:1}
svg .value{font-size:11.5px;fill:var(--ink);paint-order:stroke;stroke:var(--paper);stroke-width:3px}
svg .behind{fill:none;stroke:var(--line);stroke-width:1.4}
svg .leader{stroke:var(--soft);stroke-width:.8}
svg .pareto{fill:none;stroke:var(--soft);stroke-width:1.3;stroke-dasharray:2 4}
.checkpoint{--kind:var(--checkpoint)}.graph{--kind:var(--graph)}.engine{--kind:var(--engine)}.bundle{--kind:var(--bundle)}
.whisker line{stroke:var(--kind);stroke-width:1.6;opacity:.65}
.whisker .faint{opacity:.4;stroke-width:1.2}
.marker{fill:var(--kind);stroke:var(--paper);stroke-width:1.2}
.marker .hit{fill:transparent;stroke:none}
.marker[tabindex]{cursor:pointer;outline:none}
.marker[tabindex]:focus-visible .hit{stroke:var(--accent);stroke-width:2}
.tip{position:fixed;z-index:2;max-width:min(340px,calc(100vw - 16px));padding:7px 10px;border-radius:4px;
background:var(--ink);color:var(--paper);font-size:.82rem;line-height:1.45;white-space:pre-line;overflow-wrap:anywhere;
pointer-events:none}
svg .curve{fill:none;stroke:var(--accent);stroke-width:1.6;stroke-linejoin:round;opacity:var(--shade)}
svg .dot{fill:var(--accent)}
svg.swatch{display:inline-block;width:14px;height:14px;vertical-align:-2px;flex:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:.3rem 0 .2rem}
.dash{display:inline-block;width:22px;border-top:2px dotted var(--soft);vertical-align:4px}
.scroll{overflow-x:auto;border-top:1px solid var(--soft);border-bottom:1px solid var(--soft)}
.scroll:focus-visible,button:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:separate;border-spacing:0;width:100%;font-variant-numeric:tabular-nums;font-size:.86rem}
th,td{padding:9px 7px;text-align:right;vertical-align:top;white-space:nowrap;border-bottom:1px solid var(--line);
font-weight:400}
tbody tr:last-child>*{border-bottom:0}
th:first-child,td:first-child{text-align:left;padding-left:2px;position:sticky;left:0;background:var(--paper)}
th:last-child,td:last-child{padding-right:2px}
td small,th small{display:block;color:var(--soft);font-size:.76rem;line-height:1.35}
.figures th[scope=row],.stages th[scope=row]{font-weight:600}
.stages td:last-child{white-space:normal;text-align:left;font-size:.76rem;color:var(--soft);min-width:26em;
overflow-wrap:anywhere}
.stages th[scope=row]{white-space:normal;overflow-wrap:anywhere;min-width:8em;max-width:16em}
.stages td:not(:last-child){min-width:6.5em}b{unicode-bidi:isolate}
.stages th small{font-weight:400}.stages th b{color:var(--ink)}
.stages td small{white-space:normal;overflow-wrap:anywhere;max-width:12em;margin-left:auto}
.stages th:last-child{text-align:left}
.heat{width:auto}.heat td{background:color-mix(in srgb,var(--accent) calc(var(--heat,0)*var(--strong)),var(--paper));
border:1px solid var(--paper);min-width:4.2em;print-color-adjust:exact}
.heat td:last-child{padding-right:7px}.layers{width:auto}
.scroll:has(.heat,.layers){width:fit-content;max-width:100%}
.layers th,.layers td{padding:4px 10px}.layers thead th{white-space:normal}
.figures th[scope=row] svg{float:left;margin:4px 7px 0 0}
.figures th[scope=row] span{display:block;margin-left:21px;white-space:normal;overflow-wrap:anywhere;min-width:8em}
.figures th[scope=row] small{font-weight:400}
thead th{vertical-align:bottom;padding:6px 9px;color:var(--soft);font-size:.82rem}
th button{all:unset;cursor:pointer}
th button:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
th button:hover,th[aria-sort$=ing] button{color:var(--ink)}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
details{margin:1.4rem 0 0}
summary{cursor:pointer;color:var(--accent);font-size:.92rem;margin-bottom:.7rem;width:fit-content}
.all{font-size:.8rem}.all th,.all td{padding:3px 10px}.all thead th{font-weight:600}
.all td{white-space:normal;min-width:9em}
.lists{display:grid;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));gap:8px 22px;margin-top:1rem}
.lists h3{margin:.6rem 0 .3rem;border-bottom:1px solid var(--line);padding-bottom:.3rem}
.lists ol,.lists ul{margin:0;padding-left:2em;font-size:.87rem;line-height:1.42}
.lists ul{list-style:none;padding-left:0;color:var(--soft)}
.lists li{margin:.22em 0;overflow-wrap:anywhere}
.hit{font-weight:700;color:var(--accent)}
.hit::after{content:" \\2713"}
.multiples{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:18px 26px}
dl{display:grid;grid-template-columns:minmax(8em,max-content) 1fr;gap:6px 22px;font-size:.9rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--wash);white-space:pre-wrap;overflow-wrap:anywhere;
padding:12px 14px;font-size:.84rem;border-radius:4px}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media(max-width:640px){main{padding:32px 16px 48px}h1{font-size:1.65rem}.finding{font-size:1.05rem}
svg.wide{display:none}svg.narrow{display:block}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.7rem}
.figures th[scope=row] span{min-width:5.5em;max-width:7em}
.stages td:last-child{min-width:46em}h2{margin-top:2.4rem}}
@media print{details,.tip,.screen,th button::after{display:none!important}:root{color-scheme:light;font-size:12px}
body{font-size:1rem}main{max-width:none;padding:0}.scroll{overflow:visible}table{font-size:8.5pt}
th,td{padding:5px 4px;position:static!important}figure,tr,pre,.lists>div,.figures,.heat,.layers{break-inside:avoid}
.lists{grid-template-columns:repeat(auto-fill,minmax(110px,1fr));gap:8px 14px}
h2,h3{break-after:avoid}thead{display:table-header-group}.stages td:last-child{min-width:0}
svg.wide{display:block;max-height:120mm}svg.narrow{display:none}.multiples{grid-template-columns:repeat(3,1fr)}
@page{size:A4;margin:14mm}}
"""

SCRIPT = """
document.querySelectorAll('.figures thead button').forEach((button, column) => {
  button.addEventListener('click', () => {
    const head = button.parentElement, body = head.closest('table').tBodies[0];
    const down = head.getAttribute('aria-sort') !== 'descending' && column > 0
      || column === 0 && head.getAttribute('aria-sort') === 'ascending';
    const value = row => row.cells[column].dataset.value;
    const order = (a, b) => column === 0 ? value(a).localeCompare(value(b)) : value(a) - value(b);
    const known = [...body.rows].filter(row => value(row) !== '');
    const unknown = [...body.rows].filter(row => value(row) === '');
    known.sort((a, b) => down ? order(b, a) : order(a, b));
    head.parentElement.querySelectorAll('th').forEach(other => other.setAttribute('aria-sort', 'none'));
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    body.append(...known, ...unknown);
  });
});
const tip = document.querySelector('.tip'), marks = document.querySelectorAll('.marker[tabindex]');
const hide = () => { tip.hidden = true; };
const show = mark => {
  tip.textContent = mark.getAttribute('aria-label');
  tip.hidden = false;
  const at = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(at.left + at.width / 2 - own.width / 2, document.documentElement.clientWidth - own.width - 8);
  tip.style.left = Math.max(8, left) + 'px';
  tip.style.top = (at.top - own.height - 4 < 0 ? at.bottom + 4 : at.top - own.height - 4) + 'px';
};
marks.forEach(mark => {
  ['pointerenter', 'focus'].forEach(kind => mark.addEventListener(kind, () => show(mark)));
  ['pointerleave', 'blur'].forEach(kind => mark.addEventListener(kind, hide));
});
document.addEventListener('keydown', event => { if (event.key === 'Escape') hide(); });
document.addEventListener('scroll', hide, true);
"""
