// Fits a figure into its window: panels are stacked where it is narrow, and title, menus and legend stand one below
// the other above the plot, slider and the line of a click below it. The arrangements are made in style.py.
function (graph, {arrangements, captions, below}) {
  const NARROW = 600, BAR = 30, MENU = 34, LINE = 1.3, AXIS = 46, SLIDER = 58;
  if (!document.getElementById('dfa-lens-narrow')) {
    const style = document.createElement('style');
    style.id = 'dfa-lens-narrow';
    style.textContent = '.dfa-lens-narrow .modebar { display: none !important; }';
    document.head.append(style);
  }
  const title = graph.layout.title && graph.layout.title.text;
  const round = value => Math.round(value * 1000) / 1000;
  // Words in lines of so many pixels; letters are about half as wide as the font is high.
  const wrapped = (text, size, room) => text.split(' ').reduce((lines, word) => {
    const last = lines[lines.length - 1];
    if (last && (last.length + 1 + word.length) * size * 0.55 > room) { return [...lines, word]; }
    return [...lines.slice(0, -1), last ? `${last} ${word}` : word];
  }, []);
  let before = '', tries = 0, width = 0;
  const fit = () => {
    const full = graph._fullLayout, size = full._size;
    if (!size || !graph.clientWidth) { return; }
    if (full.width !== width) { width = full.width; tries = 0; }
    if (tries++ > 6) { return; }
    const narrow = width < NARROW;
    graph.classList.toggle('dfa-lens-narrow', narrow);
    const fitting = arrangements.find(([least]) => width >= least);
    const change = fitting ? {...fitting[1]} : {};
    const height = change.height || full.height;
    delete change.height;
    if (height !== full.height) { // not by plotly's layout, which would fix the width as well
      graph.style.height = `${height}px`;
      Plotly.Plots.resize(graph);
      return;
    }
    let y = narrow ? 6 : BAR;
    if (title) {
      const font = full.title.font.size;
      const lines = wrapped(title, font, width - 20 - (narrow ? 0 : 190));
      Object.assign(change, {
        'title.text': lines.join('<br>'), 'title.yref': 'container', 'title.yanchor': 'top',
        'title.y': round(1 - (6 + (lines.length - 1) * font * LINE * 0.65) / height), // of several lines plotly lifts the first
      });
      y = Math.max(y, 10 + lines.length * font * LINE);
    }
    const menus = full.updatemenus || [];
    const legend = full.legend && full.legend.orientation === 'h' ? graph.querySelector('.legend .bg') : null;
    const {width: long, height: tall} = legend ? legend.getBoundingClientRect() : {width: 0, height: 0};
    if (menus.length) {
      change['updatemenus[0].y'] = round(1 + (size.t - y) / size.h);
      change['updatemenus[0].yanchor'] = 'top';
      if (!legend || long + 170 > size.w) { y += MENU; }
    }
    if (legend) {
      Object.assign(change, {'legend.yref': 'container', 'legend.y': round(1 - y / height), 'legend.yanchor': 'top'});
      y += Math.max(tall, menus.length && long + 170 <= size.w ? MENU : 0);
    }
    change['margin.t'] = Math.round(y + captions + 10);
    const sliders = full.sliders || [];
    sliders.forEach((_, i) => { change[`sliders[${i}].y`] = round(-AXIS / size.h); });
    if (sliders.length) { change['margin.b'] = AXIS + SLIDER + below; }
    const key = JSON.stringify(change);
    if (key === before) { return; }
    before = key;
    Plotly.relayout(graph, change);
  };
  graph.on('plotly_afterplot', fit);
  // A scroll bar that appears, or a closed part that opens, changes the width without a resize of the window.
  new ResizeObserver(() => {
    if (!graph.layout.width && graph.clientWidth && graph.clientWidth !== graph._fullLayout.width) {
      Plotly.Plots.resize(graph);
    }
  }).observe(graph);
  graph.parentElement.style.height = ''; // where plotly writes the height, so that it can't change
  graph.style.height = `${graph._fullLayout.height}px`;
  fit();
}
