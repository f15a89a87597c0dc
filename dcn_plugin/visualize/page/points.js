"use strict";

// Where taps read, from the data of the page alone: nothing here knows the document, so any engine can run it.
// Pairs are [y, x]. A layer samples its input; `grid` maps that to the image, `outGrid` its output, as p * scale + shift.

const points = (() => {
  // Numbers are stored as 16-bit integers in steps of a power of two.
  function integers(packed) {
    const raw = atob(packed.data);
    const bytes = Uint8Array.from(raw, (letter) => letter.charCodeAt(0));
    return new Int16Array(bytes.buffer);
  }

  function unpack(layer) {
    const mask = layer.mask && { values: integers(layer.mask), step: layer.mask.step };
    return { ...layer, offset: { values: integers(layer.offset), step: layer.offset.step }, mask };
  }

  // Ties go to the even number, as in torch.round.
  function nearest(value) {
    const low = Math.floor(value);
    if (value - low === 0.5) return low % 2 === 0 ? low : low + 1;
    return Math.round(value);
  }

  const toImage = (at, grid) => at.map((value, axis) => value * grid[axis][0] + grid[axis][1]);
  const cellOf = (at, layer) => at.map((value, axis) => nearest((value - layer.outGrid[axis][1]) / layer.outGrid[axis][0]));
  const inside = (cell, size) => cell.every((value, axis) => value >= 0 && value < size[axis]);
  const clamped = (cell, size) => cell.map((value, axis) => Math.min(Math.max(value, 0), size[axis] - 1));

  // A layer whose outputs all read the same samples has one pixel's worth of numbers.
  function start(layer, group, cell) {
    const [height, width] = layer.shared ? [1, 1] : layer.map;
    const pixel = layer.shared ? 0 : cell[0] * width + cell[1];
    return ((group % layer.groups) * height * width + pixel) * layer.first.length;
  }

  // What one output pixel reads: for each tap its offset, where it lies on the layer's input, and its modulation.
  function taps(layer, group, cell, deformed = true) {
    const at = start(layer, group, cell);
    return layer.first.map((first, tap) => {
      const offset = [0, 1].map((axis) => layer.offset.values[2 * (at + tap) + axis] * layer.offset.step);
      const position = [0, 1].map((axis) => cell[axis] * layer.stride[axis] + first[axis] + (deformed ? offset[axis] : 0));
      return { offset, position, weight: layer.mask ? layer.mask.values[at + tap] * layer.mask.step : 1 };
    });
  }

  // Carry the taps of an output pixel of the last layer down to the first, each to the nearest output pixel of the layer
  // before. Weights multiply along the way; taps outside of a map read zeros and are followed no further.
  function follow(chain, group, cell, deformed = true) {
    let reached = [{ cell, weight: 1 }];
    let found = [];
    let lost = 0;
    const cells = [];
    for (let index = chain.length - 1; index >= 0; index -= 1) {
      const layer = chain[index];
      if (layer.shared) reached = reached.slice(0, 1); // the same samples for all
      cells[index] = reached.map((item) => item.cell);
      found = reached.flatMap((item) => taps(layer, group, item.cell, deformed).map((tap) => ({
        at: toImage(tap.position, layer.grid), weight: layer.shared ? tap.weight : item.weight * tap.weight,
      })));
      if (index > 0) {
        const before = chain[index - 1];
        const next = found.map((point) => ({ cell: cellOf(point.at, before), weight: point.weight }));
        reached = next.filter((item) => inside(item.cell, before.map));
        lost += next.length - reached.length;
      }
    }
    return { points: found, cells, lost };
  }

  // Effective dilation: the mean distance between the samples of adjacent taps, in pixels of the layer's input.
  function dilation(layer, group, cell, deformed = true) {
    if (!layer.kernel || layer.first.length < 2) return null;
    const [rows, columns] = layer.kernel;
    const at = taps(layer, group, cell, deformed).map((tap) => tap.position);
    let sum = 0;
    let pairs = 0;
    for (let tap = 0; tap < at.length; tap += 1) {
      const others = [];
      if (tap % columns + 1 < columns) others.push(tap + 1);
      if (Math.floor(tap / columns) + 1 < rows) others.push(tap + columns);
      for (const other of others) {
        sum += Math.hypot(at[tap][0] - at[other][0], at[tap][1] - at[other][1]);
        pairs += 1;
      }
    }
    return sum / pairs;
  }

  // Without spreading the values over the arguments of a call, of which there may be too many.
  const extent = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  function meanDilation(layer, group, cells) {
    const values = cells.map((cell) => dilation(layer, group, cell));
    return values.length && values[0] !== null ? mean(values) : null;
  }

  function allCells(layer) {
    return Array.from({ length: layer.map[0] * layer.map[1] }, (_, i) => [Math.floor(i / layer.map[1]), i % layer.map[1]]);
  }

  // Lengths of all offsets of a group, in order of size.
  function lengths(layer, group) {
    const count = layer.offset.values.length / 2 / layer.groups;
    const first = (group % layer.groups) * count;
    const { values, step } = layer.offset;
    return Float64Array.from({ length: count }, (_, i) => (
      Math.hypot(values[2 * (first + i)], values[2 * (first + i) + 1]) * step)).sort();
  }

  function histogram(sorted, bins) {
    const largest = sorted[sorted.length - 1];
    const counts = new Array(bins).fill(0);
    for (const value of sorted) counts[Math.min(bins - 1, largest ? Math.floor((value / largest) * bins) : 0)] += 1;
    return { counts, largest };
  }

  const quantile = (sorted, part) => sorted[Math.round(part * (sorted.length - 1))];

  // How strong a point is drawn: as a part of the strongest, and still to be seen where it is weak; 0 is not read.
  function opacity(weight, strongest) {
    return weight === 0 ? 0 : Math.max(0.2, Math.abs(weight) / strongest);
  }

  return {
    allCells, cellOf, clamped, dilation, extent, follow, histogram, lengths, meanDilation, nearest, opacity, quantile, taps, toImage,
    unpack,
  };
})();
