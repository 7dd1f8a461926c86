const state = { unit: 0 };
const controls = make('div', root, undefined, 'controls');
picker(controls, data.kind, data.units, (unit) => { state.unit = unit; show(); });
const caption = make('div', root, undefined, 'caption');
const texts = data.texts.map((text, t) => {
  if (text.name) make('div', root, text.name, 'caption');
  return { boxes: tokens(root, text.tokens, (i) => say(t, i), (i) => say(t, i)), values: floats(text.values) };
});
const value = (t, i) => texts[t].values[state.unit * texts[t].boxes.length + i];
const say = (t, i) => {
  caption.textContent = `${data.kind} ${data.units[state.unit]}, position ${i}  ${data.texts[t].tokens[i]}: ${write(value(t, i))} ${data.unit}`.trimEnd();
};
const show = () => {
  const all = texts.flatMap((text, t) => text.boxes.map((_, i) => value(t, i))).filter((number) => !Number.isNaN(number));
  const most = Math.max(...all.map(Math.abs), 0) || 1;
  caption.textContent = `${data.kind} ${data.units[state.unit]}: from ${write(Math.min(...all))} to ${write(Math.max(...all))} ${data.unit}`.trimEnd();
  texts.forEach((text, t) => text.boxes.forEach((box, i) => {
    box.number.textContent = write(value(t, i));
    paint(box, Number.isNaN(value(t, i)) ? 0 : value(t, i) / most);
  }));
};
show();
dark.addEventListener('change', show);
