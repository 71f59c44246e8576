"""Style and script of the page of a run. Both work from a file, without a server or a network."""

STYLE = """\
:root { color-scheme: light dark; --page: #fff; --text: #1c2128; --soft: #57606a; --line: #d5dbe1; --area: #f4f6f8;
  --mark: #0b62c4; --c0: #d9480f; --c1: #1971c2; --c2: #2b8a3e; --c3: #9c36b5; --c4: #846200; --c5: #c2255c }
@media (prefers-color-scheme: dark) {
  :root { --page: #101418; --text: #e6e9ed; --soft: #a2acb7; --line: #343c46; --area: #1a2027;
    --mark: #74b9ff; --c0: #ff9250; --c1: #60b2ff; --c2: #6fd087; --c3: #d79bf0; --c4: #e0b93c; --c5: #ff8fb3 }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 0 auto; padding: 1rem; color: var(--text);
  background: var(--page); overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem } p { margin: .4rem 0 }
header p, figcaption, .soft, summary { color: var(--soft) }
progress { width: 100%; accent-color: var(--mark) }
.warning { border-left: 4px solid var(--c0); padding: .4rem .8rem; background: var(--area) }
figure { margin: .5rem 0 } figcaption { margin-top: .4rem }
.rows { display: grid; grid-template-columns: 1.5rem 1fr; gap: 0 .4rem }
.rows b { contain: size; writing-mode: vertical-rl; transform: rotate(180deg); text-align: center; white-space: nowrap;
  border-right: 4px solid var(--line); font: 600 clamp(.6rem, 2.4vw, .85rem)/1.2 system-ui, sans-serif; margin: 1px 0 }
.rows b.teacher { border-color: var(--mark); color: var(--mark) }
.rows a { grid-column: 2; grid-row: 1 / span 2; display: block }
img { display: block; max-width: 100% } .rows img { width: 100% }
.controls { display: flex; gap: .6rem; align-items: center } .controls input { flex: 1; min-width: 0 }
button { font: inherit; padding: .2rem .8rem; border: 1px solid var(--line); border-radius: 6px; cursor: pointer;
  background: var(--area); color: var(--text); min-width: 5.5rem } button:hover { border-color: var(--mark) }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: .5rem 1.5rem }
.chart ul { display: flex; flex-wrap: wrap; gap: 0 1rem; list-style: none; margin: 0; padding: 0; color: var(--text) }
.chart figcaption { font-size: .9rem } .chart > svg { width: 100%; display: block }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft) }
svg path, svg polyline { fill: none; stroke-width: 1.6 }
.key { width: 24px; height: 8px; margin-right: .3rem; vertical-align: middle }
.tick { stroke: var(--line); stroke-width: 1 !important } .at { stroke: var(--mark); stroke-dasharray: 3 3 }
.usual { fill: var(--mark); opacity: .08 } svg .teacher { stroke: var(--mark); stroke-width: 1; opacity: .6 }
.c0 { stroke: var(--c0) } .c1 { stroke: var(--c1) } .c2 { stroke: var(--c2) }
.c3 { stroke: var(--c3) } .c4 { stroke: var(--c4) } .c5 { stroke: var(--c5) }
.c1, .c4 { stroke-dasharray: 7 3 } .c2, .c5 { stroke-dasharray: 2 3 }
circle { fill: var(--page); stroke-dasharray: none !important }
.step { display: grid; grid-template-columns: 1fr auto; gap: .2rem .6rem; align-items: center; margin: .8rem 0 }
pre { grid-column: 1 / -1; margin: 0; padding: .6rem .8rem; background: var(--area); border: 1px solid var(--line);
  border-radius: 6px; white-space: pre-wrap; font: .875rem/1.45 ui-monospace, monospace }
pre span { white-space: nowrap }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
td, th { border: 1px solid var(--line); padding: 2px 8px; text-align: left; vertical-align: top }
.measures { overflow-wrap: normal } th { background: var(--area) } summary { cursor: pointer; padding: .3rem 0 }
ol { columns: 20rem; margin: .4rem 0; padding-left: 1.6rem }"""

SCRIPT = """\
const { grids, seconds } = JSON.parse(document.getElementById("grids").textContent);
const find = (id) => document.getElementById(id), all = (query) => [...document.querySelectorAll(query)];
const at = find("at"), image = find("image"), play = find("play"), folds = all("details");
const last = grids.length - 1, before = history.state || {};  // of the page before it was read again
let timer = 0;

function show(index) {
  const [updates, source, compared] = grids[index];
  at.value = index;
  at.setAttribute("aria-valuetext", `after ${updates} updates`);
  image.src = find("whole").href = source;
  image.alt = image.alt.replace(/[0-9]+/, updates);
  find("updates").textContent = updates;
  find("compared").textContent = compared;
  for (const line of all(".at")) {
    const x = Number(line.dataset.left) + updates * line.dataset.scale;
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    line.setAttribute("visibility", "visible");
  }
  remember();
}
function remember() {
  const open = folds.flatMap((fold, index) => (fold.open ? [index] : []));
  history.replaceState({ open, at: at && Number(at.value) < last ? Number(at.value) : null }, "");
}
function pause() {
  clearInterval(timer);
  timer = 0;
  play.textContent = "Play";
}
function start() {
  if (Number(at.value) === last) show(0);
  play.textContent = "Pause";
  timer = setInterval(() => {
    if (!image.complete) return;
    show(Number(at.value) + 1);
    if (Number(at.value) === last) pause();
  }, 700);
}
function sharpen() {  // small images are enlarged in squares, large ones are reduced smoothly
  image.style.imageRendering = image.naturalWidth < image.clientWidth * devicePixelRatio ? "pixelated" : "auto";
}
async function copy(button) {
  const code = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

for (const element of all("[data-script]")) element.hidden = false;
for (const button of all(".copy")) button.onclick = () => copy(button);
for (const index of before.open || []) if (folds[index]) folds[index].open = true;
for (const fold of folds) fold.ontoggle = remember;
if (image) {
  image.onload = window.onresize = sharpen;
  sharpen();
}
if (at) {
  show(Math.min(before.at ?? last, last));
  at.oninput = () => { pause(); show(Number(at.value)); };
  play.onclick = () => (timer ? pause() : start());
  document.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.target === at || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    pause();
    show(Math.max(0, Math.min(last, Number(at.value) + step)));
  };
}
if (seconds) setInterval(() => timer || location.reload(), 1000 * seconds);"""
