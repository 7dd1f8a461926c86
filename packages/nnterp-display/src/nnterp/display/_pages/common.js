const make = (tag, parent, text, kind) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  if (parent) parent.append(element);
  return element;
};
const root = document.getElementById('view');
// Orange for positive numbers and blue for negative ones, mixed into the paper; letters in whichever ink reads better.
const dark = window.matchMedia('(prefers-color-scheme: dark)');
const paper = () => ((data.theme || (dark.matches ? 'dark' : 'light')) === 'dark' ? [20, 23, 28] : [255, 255, 255]);
const hue = (level) => (level < 0 ? [86, 180, 233] : [230, 159, 0]);
const linear = (part) => (part <= 10.3 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4);
const paint = (element, level) => {
  const share = Math.min(Math.abs(level), 1), over = hue(level), under = paper();
  const mixed = over.map((part, i) => Math.round(share * part + (1 - share) * under[i]));
  const [red, green, blue] = mixed.map(linear);
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  element.style.background = `rgb(${mixed})`;
  element.style.color = (luminance + 0.05) ** 2 > 0.05 * 1.05 ? '#000' : '#fff';
};
const write = (value) => {
  if (value === null || Number.isNaN(value)) return '–';
  if (value === 0 || Math.abs(value) >= 0.001) return value.toFixed(3);
  return value.toExponential(1);
};
const picker = (parent, name, labels, change) => {
  const label = make('label', parent, name + ' ');
  const select = make('select', label);
  labels.forEach((text, i) => { make('option', select, text).value = i; });
  select.setAttribute('aria-label', name);
  const step = (by) => { select.value = (Number(select.value) + by + labels.length) % labels.length; change(Number(select.value)); };
  const buttons = [['‹', -1], ['›', 1]].map(([sign, by]) => {
    const button = make('button', parent, sign);
    button.setAttribute('aria-label', `${by < 0 ? 'previous' : 'next'} ${name}`);
    button.onclick = () => step(by);
    return button;
  });
  if (labels.length < 2) { label.style.display = 'none'; buttons.forEach((button) => button.remove()); }
  select.onchange = () => change(Number(select.value));
  return select;
};
const tokens = (parent, texts, point, pin) => {
  const line = make('div', parent, undefined, 'text');
  return texts.map((text, i) => {
    const box = make('span', line, text, 'token');
    box.tabIndex = 0;
    box.number = make('small', box, '');
    box.onmouseenter = box.onfocus = () => point(i);
    box.onclick = () => pin(i);
    if (text.endsWith('↵')) make('span', line, undefined, 'break');
    return box;
  });
};
const floats = (numbers) => Float32Array.from(numbers, (number) => (number === null ? NaN : number));
