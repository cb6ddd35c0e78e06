"""The page on which a rater compares two texts at a time: one file that opens offline and does not know which editor wrote what."""

from collections.abc import Sequence
from dataclasses import asdict

from jinja2 import Environment

from factlens.ratings import ANSWERS_FORMAT, FIRST, QUESTIONS, SECOND, TIE, Shown, page_id

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>Which text is better?</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 1.5rem auto; max-width: 1100px; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .6rem; } h2 { font-size: 1rem; margin: 0 0 .4rem; color: #555; }
[hidden] { display: none !important; }
li { margin: .3rem 0; } .prose { max-width: 46rem; } .quiet { color: #555; font-size: .9rem; }
progress { width: 100%; height: .5rem; }
.fact { background: #fff7d6; border-left: .3rem solid #d6a700; padding: .6rem .9rem; margin: .8rem 0 1rem; }
.fact p { margin: 0; } .fact .said { font-size: 1.15rem; font-weight: 600; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
.text { border: 1px solid #ccc; border-radius: .4rem; padding: .7rem .9rem; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
.question { border: 1px solid transparent; border-radius: .4rem; padding: .5rem .9rem; margin-top: .7rem; }
.question.asked { border-color: #1f5fbf; background: #f3f7fd; }
.question p { margin: 0 0 .4rem; }
button { font: inherit; padding: .4rem 1.1rem; border: 1px solid #888; border-radius: .4rem; background: #fff; cursor: pointer; }
button[aria-pressed="true"] { background: #1f5fbf; border-color: #1f5fbf; color: #fff; }
button:disabled { color: #aaa; border-color: #ddd; cursor: default; }
.move { display: flex; justify-content: space-between; margin: 1.1rem 0; }
input { font: inherit; padding: .4rem; width: 18rem; } textarea { width: 100%; height: 12rem; }
kbd { border: 1px solid #bbb; border-radius: .2rem; padding: 0 .3rem; font-size: .85em; }
.warning { color: #8a3b00; }
</style>
</head>
<body>
<noscript><p>This page needs JavaScript, which is switched off in this browser. It loads nothing and sends nothing.</p></noscript>

<section id="start" hidden>
<h1>Which text is better?</h1>
<div class="prose">
<p>A computer program that writes text was made to believe one new fact, in two different ways. Nearly all of these facts are made up.
After either way it wrote a text. You see the new fact and the two texts, and answer two questions about them:</p>
<ol>
<li><b>Which text is more consistent with the new fact?</b> Take the new fact for true, whatever you know about the world. The more
consistent text says what the fact says, or what would follow from it, and does not contradict it.</li>
<li><b>Which text is more fluent?</b> Now leave aside what it claims. The more fluent text reads as if somebody who writes good English had
written it: whole, natural sentences that hang together and do not repeat themselves.</li>
</ol>
<p>The questions are separate: a text can be the better one in one and the worse one in the other. Texts may break off at their end, which
counts against neither. Please read both before you answer, look nothing up, and do not talk about them with others who do the same.
Which text stands first was drawn at random.
{% if data.ties %}If you see no difference at all, say so.{% else %}If they seem equal, choose the one that you lean to.{% endif %}</p>
<p>There are {{ data['items'] | length }} pairs. You can stop and go on later in the same browser, with the same name.
Nothing leaves your computer: at the end you save a file, and give it to whoever gave you this page.</p>
<p><label>Your name or initials: <input id="name" maxlength="60" autocomplete="off"></label>
<button id="begin">Begin</button></p>
<p id="earlier" class="quiet" aria-live="polite"></p>
</div>
</section>

<section id="item" hidden>
<p id="where" class="quiet" aria-live="polite"></p>
<progress id="bar" value="0" max="1" aria-label="pairs answered"></progress>
<div class="fact"><p class="quiet">Suppose that this is true:</p><p id="fact" class="said" dir="auto"></p></div>
<div class="texts">
<div class="text"><h2>Text 1</h2><div id="first" class="said" dir="auto"></div></div>
<div class="text"><h2>Text 2</h2><div id="second" class="said" dir="auto"></div></div>
</div>
{% for question, words in questions %}<div class="question" data-question="{{ question }}" role="group" aria-label="{{ question }}">
<p>{{ words }}</p>
{% for choice, label in choices %}<button data-choice="{{ choice }}" aria-pressed="false">{{ label }}</button>
{% endfor %}</div>
{% endfor %}<div class="move"><button id="back">Back</button><button id="next" disabled>Next</button></div>
<p class="quiet">Keys: <kbd>1</kbd> or <kbd>←</kbd> text 1, <kbd>2</kbd> or <kbd>→</kbd> text 2,
{% if data.ties %}<kbd>0</kbd> no difference, {% endif %}<kbd>Enter</kbd> next, <kbd>Backspace</kbd> back;
<kbd>C</kbd> and <kbd>F</kbd> go to the question of consistency and of fluency.</p>
</section>

<section id="end" hidden>
<h1>That was the last pair. Thank you!</h1>
<div class="prose">
<p>Save your answers, and give the file to whoever gave you this page.</p>
<p><button id="save">Save the answers</button> <span id="saved" class="quiet" aria-live="polite"></span></p>
<p class="quiet">Where saving does not work, copy all of this into a file of the same kind:</p>
<p><textarea id="copy" readonly aria-label="the answers as text"></textarea></p>
<p><button id="again">Back to the last pair</button></p>
</div>
</section>

<p id="unkept" class="warning" role="alert" hidden>This browser keeps nothing of this page: do not close or reload it before you have
saved your answers at the end.</p>

<script type="application/json" id="data">{{ data | tojson }}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const count = data.items.length;
const part = (id) => document.getElementById(id);
const groups = data.questions.map((name) => document.querySelector(`[data-question="${name}"]`));
let rater = "", place = 0, asked = 0, answers = {}, kept = true, saved = false;

// What the browser keeps: by page and rater, where it lets us.
const slot = (name) => `factlens-rate:${data.page}:${name}`;
function read(key) {
  try { return localStorage.getItem(key); } catch { return null; }
}
function write(key, text) {
  try { localStorage.setItem(key, text); return true; } catch { return false; }
}
function remember() {
  saved = false;
  kept = write(slot("of " + rater), JSON.stringify({ place, answers })) && write(slot("last"), rater);
  part("unkept").hidden = kept;
}
function recalled(name) {
  // Taken over piece by piece: what is kept may be of a page that was edited by hand.
  const own = { place: 0, answers: {} };
  let found = null;
  try { found = JSON.parse(read(slot("of " + name))); } catch { return own; }
  for (const item of data.items) {
    const choices = {};
    for (const question of data.questions) {
      const choice = found?.answers?.[item.id]?.[question];
      if (data.choices.includes(choice)) choices[question] = choice;
    }
    if (Object.keys(choices).length) own.answers[item.id] = choices;
  }
  const open = data.items.findIndex((item) => !done(item, own.answers));
  const last = open < 0 ? count : open;
  own.place = Number.isInteger(found?.place) ? Math.max(0, Math.min(found.place, last)) : last;
  return own;
}

const done = (item, of) => data.questions.every((question) => of[item.id]?.[question]);
const finished = () => data.items.filter((item) => done(item, answers)).length;

function go(to) {
  place = Math.max(0, Math.min(to, count));
  const own = answers[data.items[place]?.id] ?? {};
  asked = Math.max(0, data.questions.findIndex((question) => !own[question]));
  document.activeElement?.blur();
  window.scrollTo(0, 0);
  remember();
  show();
}
function next() {
  if (place < count && done(data.items[place], answers)) go(place + 1);
}
function answer(number, choice) {
  const own = (answers[data.items[place].id] ??= {});
  own[data.questions[number]] = choice;
  const open = data.questions.findIndex((question) => !own[question]);
  asked = open < 0 ? number : open;
  remember();
  show();
}

function show() {
  const item = data.items[place];
  part("start").hidden = rater !== "";
  part("item").hidden = rater === "" || !item;
  part("end").hidden = rater === "" || Boolean(item);
  if (rater === "") return;
  if (!item) {
    part("copy").value = exported();
    part("saved").textContent = "";
    return;
  }
  part("where").textContent = `Pair ${place + 1} of ${count}, ${finished()} answered`;
  part("bar").max = count;
  part("bar").value = finished();
  for (const name of ["fact", "first", "second"]) part(name).textContent = item[name];
  groups.forEach((group, number) => {
    group.classList.toggle("asked", number === asked);
    const choice = answers[item.id]?.[data.questions[number]];
    for (const button of group.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(button.dataset.choice === choice));
  });
  part("back").disabled = place === 0;
  part("next").disabled = !done(item, answers);
}

function exported() {
  const ordered = {};
  for (const item of data.items) ordered[item.id] = answers[item.id];
  return JSON.stringify({ format: data.format, page: data.page, rater, answers: ordered }, null, 1) + "\\n";
}
function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([exported()], { type: "application/json" }));
  link.download = `answers-${rater.replace(/[^\\p{L}\\p{N}_-]+/gu, "_")}-${data.page.slice(0, 6)}.json`;
  link.click();
  saved = true;
  part("saved").textContent = `Saved as ${link.download}, where this browser puts its downloads.`;
}

function begin() {
  const name = part("name").value.trim();
  if (!name) { part("name").focus(); return; }
  rater = name;
  const own = recalled(name);
  answers = own.answers;
  go(own.place);
}
function tell() {
  const name = part("name").value.trim();
  const found = name ? Object.keys(recalled(name).answers).length : 0;
  part("earlier").textContent = found ? `${name} goes on where they stopped, with ${found} of ${count} pairs looked at.` : "";
}

part("name").addEventListener("input", tell);
part("name").addEventListener("keydown", (event) => {
  // Else the same press would also move on from a pair that is answered already.
  event.stopPropagation();
  if (event.key === "Enter" && !event.isComposing) begin();
});
part("begin").addEventListener("click", begin);
part("back").addEventListener("click", () => go(place - 1));
part("next").addEventListener("click", next);
part("again").addEventListener("click", () => go(place - 1));
part("save").addEventListener("click", save);
groups.forEach((group, number) => {
  for (const button of group.querySelectorAll("button"))
    button.addEventListener("click", () => answer(number, button.dataset.choice));
});

const CHOICES = { 1: "first", arrowleft: "first", 2: "second", arrowright: "second", 0: "tie" };
document.addEventListener("keydown", (event) => {
  if (rater === "" || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (place === count && event.target === part("copy")) return;
  if (key === "backspace") {
    event.preventDefault();
    if (!event.repeat) go(place - 1);
  }
  if (place === count) return;
  if (data.choices.includes(CHOICES[key])) {
    event.preventDefault();
    if (!event.repeat) answer(asked, CHOICES[key]);
  } else if (key === "enter") {
    event.preventDefault();
    if (!event.repeat) next();
  } else if (key === "c" || key === "f") {
    asked = key === "c" ? 0 : 1;
    show();
  }
});
window.addEventListener("beforeunload", (event) => {
  if (rater !== "" && !kept && !saved) event.preventDefault();
});

part("unkept").hidden = write(slot("try"), "");
part("name").value = read(slot("last")) ?? "";
tell();
show();
</script>
</body>
</html>
"""
_WORDS = {
    "consistency": "Which text is more consistent with the new fact?",
    "fluency": "Which text is more fluent, whatever it claims?",
}
_LABELS = {FIRST: "Text 1", TIE: "No difference", SECOND: "Text 2"}


def rating_page(shown: Sequence[Shown], *, ties: bool = False) -> str:
    """The page that asks which of two texts is more consistent with the new fact, and which is more fluent.

    A function of what is shown alone: neither the editors nor the seed of the order reach it. It needs nothing else, sends nothing,
    keeps the answers in the browser where that works, and saves them as a file at the end (`ratings.read_answers`). The texts are
    in it as escaped JSON and are written to the page as text.

    Args:
        shown: from `ratings.draw`.
        ties: whether "no difference" is an answer; as given to `draw`.
    """
    choices = [(choice, label) for choice, label in _LABELS.items() if ties or choice != TIE]
    data = {
        "format": ANSWERS_FORMAT,
        "page": page_id(shown, ties),
        "ties": ties,
        "questions": list(QUESTIONS),
        "choices": [choice for choice, _ in choices],
        "items": [asdict(each) for each in shown],
    }
    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(data=data, choices=choices, questions=[*_WORDS.items()])
