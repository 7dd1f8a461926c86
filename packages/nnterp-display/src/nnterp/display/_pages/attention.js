const [L, H, Q, K] = data.shape, first = K - Q;
const values = floats(data.values);
// Of a causal model, only keys up to the query are stored.
const row = (q) => data.causal ? q * (first + 1) + q * (q - 1) / 2 : q * K;
const tile = row(Q);
const at = (layer, head, q, k) => data.causal && k > q + first ? 0 : values[(layer * H + head) * tile + row(q) + k];
const state = { layer: L - 1, head: 0, token: K - 1, pinned: K - 1, forward: true };

const controls = make('div', root, undefined, 'controls');
const layers = picker(controls, 'layer', data.layers, (layer) => { state.layer = layer; thumbnails(); show(); });
layers.value = state.layer;
const direction = make('button', controls);
direction.onclick = () => { state.forward = !state.forward; show(); };
const heads = make('div', root, undefined, 'heads');
const buttons = data.heads.map((name, head) => {
  const button = make('button', heads);
  const canvas = make('canvas', button);
  [canvas.width, canvas.height] = [K, Q];
  make('span', button, `head ${name}`);
  button.onclick = () => { state.head = head; show(); };
  button.canvas = canvas;
  return button;
});
const caption = make('div', root, undefined, 'caption');
const boxes = tokens(root, data.tokens, (i) => { state.token = i; show(); }, (i) => { state.pinned = i; show(); });
boxes[0].parentElement.onmouseleave = () => { state.token = state.pinned; show(); };

const thumbnails = () => buttons.forEach((button, head) => {
  const context = button.canvas.getContext('2d'), image = context.createImageData(K, Q);
  for (let q = 0; q < Q; q++) for (let k = 0; k < K; k++) {
    image.data.set([230, 159, 0, Math.round(255 * Math.min(at(state.layer, head, q, k) / data.most, 1))], 4 * (q * K + k));
  }
  context.putImageData(image, 0, 0);
});
const show = () => {
  const { layer, head, token, forward } = state;
  direction.textContent = forward ? 'from a query to its keys' : 'from a key to the queries that attend to it';
  buttons.forEach((button, i) => button.setAttribute('aria-pressed', i === head));
  const known = !forward || token >= first;
  caption.textContent = `layer ${data.layers[layer]}, head ${data.heads[head]}, ${forward ? 'query' : 'key'} ${token}  ${data.tokens[token]}`
    + (known ? '' : ': this position is no query here') + (data.weighted ? ' (attention × value norm)' : '');
  boxes.forEach((box, i) => {
    const [q, k] = forward ? [token - first, i] : [i - first, token];
    const value = q < 0 ? 0 : at(layer, head, q, k);
    const blank = q < 0 || (data.causal && k > q + first);
    box.classList.toggle('source', i === token);
    box.number.textContent = blank ? '' : write(value);
    paint(box, blank ? 0 : value / data.most);
  });
};
thumbnails(); show();
dark.addEventListener('change', show);
