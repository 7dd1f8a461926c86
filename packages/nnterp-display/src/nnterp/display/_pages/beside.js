const row = make('div', root, undefined, 'beside');
const plots = data.figures.map((figure) => {
  const panel = make('div', row, undefined, 'panel');
  const plot = make('div', panel);
  Plotly.newPlot(plot, figure.data, figure.layout, { displaylogo: false, showTips: false });
  return plot;
});
const shrink = () => plots.forEach((plot) => {
  const wide = plot._fullLayout.width, tall = plot._fullLayout.height;
  const scale = Math.min(1, (document.documentElement.clientWidth - 32) / wide);
  Object.assign(plot.style, { transformOrigin: '0 0', transform: scale < 1 ? `scale(${scale})` : '', width: `${wide}px` });
  Object.assign(plot.parentElement.style, { width: `${wide * scale}px`, height: `${tall * scale}px` });
});
shrink();
window.addEventListener('resize', shrink);
if (data.templates) {
  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  const dress = () => plots.forEach((plot) => Plotly.relayout(plot, { template: data.templates[dark.matches ? 'dark' : 'light'] }));
  dress();
  dark.addEventListener('change', dress);
}
