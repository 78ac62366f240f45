// Fits a figure into its window: panels are stacked where it is narrow, and title, menus and legend stand one below
// the other above the plot, slider and the line of a click below it. The arrangements are made in style.py.
// Without a graph nothing is drawn yet: it returns what it would change in that layout in a place of that width (a legend
// is only measured when it is drawn). A figure that is drawn so at once is not drawn again.
function (graph, {arrangements, captions, below}, undrawn) {
  const NARROW = 600, BAR = 30, MENU = 34, LINE = 1.3, AXIS = 46, SLIDER = 58;
  const round = value => Math.round(value * 1000) / 1000;
  // Words in lines of so many pixels. They may have marks, as all texts of plotly.
  const pen = document.createElement('canvas').getContext('2d');
  const wrapped = (text, {size, family}, room) => {
    pen.font = `${size}px ${family}`;
    const wide = words => pen.measureText(words.replace(/<[^>]*>/g, '').replace(/&\w+;/g, '<')).width;
    return text.split('<br>').flatMap(line => line.split(' ').reduce((lines, word) => {
      const last = lines[lines.length - 1];
      if (last && wide(`${last} ${word}`) > room) { return [...lines, word]; }
      return [...lines.slice(0, -1), last ? `${last} ${word}` : word];
    }, []));
  };
  const at = (layout, path) => path.replace(/\[(\d+)\]/g, '.$1').split('.').reduce((inner, key) => inner && inner[key], layout);
  const titled = layout => ((layout.title && layout.title.text) || '').replace(/<br>/g, ' ');
  const arrangement = width => ({...(arrangements.find(([least]) => width >= least) || [0, {}])[1]});
  // What to change, by name; `size` is that of the plot as it is now, `legend` that of a legend above it.
  const arranged = (layout, title, width, height, size, legend) => {
    const narrow = width < NARROW;
    const change = arrangement(width);
    delete change.height;
    let y = narrow ? 6 : BAR;
    if (title) {
      const font = layout.title.font.size;
      const lines = wrapped(title, {size: font, family: layout.font.family}, width - 20 - (narrow ? 0 : 190));
      Object.assign(change, {
        'title.text': lines.join('<br>'), 'title.yref': 'container', 'title.yanchor': 'top',
        // plotly sets one line below this, but of several the first one on it
        'title.y': round(1 - (6 + (lines.length > 1 ? 0.7 * font : 0)) / height),
      });
      y = Math.max(y, 10 + lines.length * font * LINE);
    }
    const {width: long, height: tall} = legend || {width: 0, height: 0};
    const menus = layout.updatemenus || [];
    const beside = legend && long + 170 <= size.w; // a legend beside the menus
    const top = y;
    if (menus.length && !beside) { y += MENU; }
    if (legend) {
      Object.assign(change, {'legend.yref': 'container', 'legend.y': round(1 - y / height), 'legend.yanchor': 'top'});
      y += Math.max(tall, menus.length && beside ? MENU : 0);
    }
    change['margin.t'] = Math.round(y + captions + 10);
    const sliders = layout.sliders || [];
    if (sliders.length) { change['margin.b'] = AXIS + SLIDER + below; }
    // The plot as it will be, so that what hangs on its height is right at once.
    const grown = side => (`margin.${side}` in change ? change[`margin.${side}`] - layout.margin[side] : 0);
    const [t, h] = [size.t + grown('t'), size.h - grown('t') - grown('b')];
    sliders.forEach((_, i) => { change[`sliders[${i}].y`] = round(-AXIS / h); });
    if (menus.length) {
      change['updatemenus[0].y'] = round(1 + (t - top) / h);
      change['updatemenus[0].yanchor'] = 'top';
    }
    return change;
  };
  if (!graph) {
    const {layout, width} = undrawn;
    const change = arrangement(width);
    const height = change.height || layout.height || 450;
    const {l, r, t, b} = layout.margin;
    const size = {t, w: width - l - r, h: height - t - b};
    return {...arranged(layout, titled(layout), width, height, size, null), height};
  }
  if (!document.getElementById('dfa-lens-narrow')) {
    const style = document.createElement('style');
    style.id = 'dfa-lens-narrow';
    style.textContent = '.dfa-lens-narrow .modebar { display: none !important; }';
    document.head.append(style);
  }
  // For what a click writes.
  graph.wrapped = (text, size, room) => wrapped(text, {size, family: graph.layout.font.family}, room).join('<br>');
  const title = titled(graph.layout);
  let tries = 0, width = 0; // a few for each width, should one change bring another
  const fit = () => {
    const full = graph._fullLayout, size = full._size;
    if (!size || !graph.clientWidth) { return; }
    if (full.width !== width) { width = full.width; tries = 0; }
    graph.classList.toggle('dfa-lens-narrow', width < NARROW);
    const height = arrangement(width).height || full.height;
    const legend = full.legend && full.legend.orientation === 'h' ? graph.querySelector('.legend .bg') : null;
    const change = arranged(full, title, width, height, size, legend && legend.getBoundingClientRect());
    const differs = ([path, value]) => JSON.stringify(at(graph.layout, path)) !== JSON.stringify(value);
    const needed = Object.entries(change).filter(differs);
    if ((height === full.height && !needed.length) || tries++ > 6) { return; }
    if (height !== full.height) { // not by plotly's layout, which would fix the width as well
      graph.style.height = `${height}px`;
      Plotly.Plots.resize(graph);
    } else {
      Plotly.relayout(graph, Object.fromEntries(needed));
    }
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
