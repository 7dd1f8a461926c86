const row = make('div', root, undefined, 'beside');
const plots = data.figures.map((figure) => {
  const panel = make('div', row, undefined, 'panel');
  const plot = make('div', panel);
  Plotly.newPlot(plot, figure.data, figure.layout, { displaylogo: false, showTips: false });
  return plot;
});
// Next to each other if their letters stay large enough, else below each other.
const LEAST = 0.6, GAP = 16;
const shrink = () => {
  const room = document.documentElement.clientWidth - 32, gaps = GAP * (plots.length - 1);
  const together = (room - gaps) / plots.reduce((sum, plot) => sum + plot._fullLayout.width, 0);
  plots.forEach((plot) => {
    const wide = plot._fullLayout.width, tall = plot._fullLayout.height;
    const scale = Math.min(1, together >= LEAST ? together : room / wide);
    Object.assign(plot.style, { transformOrigin: '0 0', transform: scale < 1 ? `scale(${scale})` : '', width: `${wide}px` });
    Object.assign(plot.parentElement.style, { width: `${Math.floor(wide * scale)}px`, height: `${tall * scale}px`, overflow: 'hidden' });
  });
};
shrink();
window.addEventListener('resize', shrink);
if (data.templates) {
  const dress = () => plots.forEach((plot) => Plotly.relayout(plot, { template: data.templates[dark.matches ? 'dark' : 'light'] }));
  dress();
  dark.addEventListener('change', dress);
}
