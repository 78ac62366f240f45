// Colours follow the reader's setting, the button changes them; figures in a closed part are drawn when it opens.
const scheme = window.matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
const paint = (graph, which) => {
  const dark = which === 'dark';
  const change = {'paper_bgcolor': dark ? '#16181c' : '#ffffff', 'font.color': dark ? '#e6e6e6' : '#222222'};
  if (graph.layout.plot_bgcolor === '#ffffff' || graph.layout.plot_bgcolor === 'white' ||
      graph.layout.plot_bgcolor === '#16181c') {
    change['plot_bgcolor'] = change['paper_bgcolor'];
  }
  Object.keys(graph.layout).filter(key => /^[xy]axis/.test(key)).forEach(key => {
    if (graph.layout[key].gridcolor) { change[key + '.gridcolor'] = dark ? '#33373f' : '#eeeeee'; }
  });
  (graph.layout.sliders || []).forEach((_, i) => {
    change[`sliders[${i}].currentvalue.font.color`] = change['font.color'];
  });
  Plotly.relayout(graph, change);
};
const show = which => {
  document.documentElement.dataset.scheme = which;
  document.querySelectorAll('.plotly-graph-div').forEach(graph => { if (graph.layout) { paint(graph, which); } });
};
document.addEventListener('DOMContentLoaded', () => {
  if (scheme === 'dark') { show('dark'); }
  document.getElementById('scheme').addEventListener('click', () =>
    show(document.documentElement.dataset.scheme === 'dark' ? 'light' : 'dark'));
  document.querySelectorAll('details').forEach(part => part.addEventListener('toggle', () =>
    part.querySelectorAll('.plotly-graph-div').forEach(graph => Plotly.Plots.resize(graph))));
});
window.addEventListener('beforeprint', () => {
  show('light');
  document.querySelectorAll('details').forEach(part => { part.open = true; });
});
