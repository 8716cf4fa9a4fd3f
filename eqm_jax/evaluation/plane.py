"""Landscapes over the plane: the field, its energy and trajectories, beside the optimal field of the data."""

import os
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from eqm_jax import plotting
from eqm_jax.equilibrium import energy, oracle
from eqm_jax.sampling.generator import Generator, Row

if TYPE_CHECKING:
  import matplotlib.axes

SHAPE = (1, 1, 2)  # of a point: an image of one pixel with two channels
REACH, CELLS = 2.6, 52  # half the side of the plotted square, and cells along the side
TRAJECTORIES, FRAMES = 80, 60
ORACLE_POINTS = 600  # data points that the oracle takes


def plot(generator: Generator, row: Row, points_N: np.ndarray, optimal: oracle.OracleField, directory: str):
  """Writes plane.png: for the network (above) and the oracle (below) the field, its energy, and descents.

  The field and the energy are those without a class; the network's descents take the classes in turn, and the row's
  guidance. Where a model gives no energy, the energy shown is the one whose gradient is nearest to the field.

  Args:
    generator: the model.
    row: of the config's samplers, one that descends; the oracle takes its step size and budget.
    points_N: the data, [N, 1, 1, 2].
    optimal: the oracle, of some of the data.
    directory: must exist.
  """
  model = generator.model
  null_labels = np.full(CELLS * CELLS, model.num_classes, np.int32)
  labels = np.arange(TRAJECTORIES, dtype=np.int32) % max(1, model.num_classes)
  fields = {"network": generator.field().bind(null_labels), "oracle": optimal}
  descended = {"network": generator.field(row).bind(labels), "oracle": optimal}
  start = generator.noise(np.arange(TRAJECTORIES))
  steps = np.unique(np.linspace(0, row.max_nfe, FRAMES).round().astype(int))

  figure, panels = plotting.figure(12, 8.2, rows=2, columns=3)
  line = np.linspace(-REACH, REACH, CELLS)
  grid_GxGx2 = np.stack(np.meshgrid(line, line), axis=-1).astype(np.float32)
  for (name, field), (left, middle, right) in zip(fields.items(), panels):
    f_GxGx2 = _on_grid(field, grid_GxGx2)
    _plot_field(left, grid_GxGx2, f_GxGx2, f"{name}: −f, and ‖f‖")
    if name == "network" and energy.is_energy(model):
      values = energy.energy(model, generator.params, null_labels)(grid_GxGx2.reshape(-1, *SHAPE))
      energy_GxG, title = np.asarray(values).reshape(CELLS, CELLS), f"energy ({model.energy})"
    else:
      energy_GxG, title = potential(f_GxGx2, line[1] - line[0]), "energy nearest to the field"
    # Equally many cells between two levels: the valleys are flat beside the walls.
    middle.contourf(line, line, energy_GxG, levels=np.unique(np.quantile(energy_GxG, np.linspace(0, 1, 40))))
    middle.set_title(f"{name}: {title}")
    record = generator.descend(row, start, descended[name], record_at=steps, record_fn=_x).record
    _plot_trajectories(right, points_N, np.asarray(record).reshape(len(steps), TRAJECTORIES, 2))
    right.set_title(f"{name}: descents, from noise to the dots")
    for panel in (left, middle, right):
      panel.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=[], yticks=[])
  figure.savefig(os.path.join(directory, "plane.png"), dpi=90)


def _plot_trajectories(panel: "matplotlib.axes.Axes", points_N: np.ndarray, positions_RxBx2: np.ndarray):
  panel.plot(*points_N.reshape(-1, 2)[:1500].T, ".", color="tab:orange", markersize=1.5)
  panel.plot(positions_RxBx2[..., 0], positions_RxBx2[..., 1], color="tab:blue", linewidth=0.5, alpha=0.6)
  panel.plot(*positions_RxBx2[-1].T, "k.", markersize=4)


def scatter(points_N: np.ndarray, real_N: np.ndarray | None = None) -> Image.Image:
  """Points [N, 1, 1, 2], over real ones if given."""
  figure, panel = plotting.figure(4, 4)
  if real_N is not None:
    panel.plot(*real_N.reshape(-1, 2)[:3000].T, ".", color="tab:orange", markersize=2)
  panel.plot(*points_N.reshape(-1, 2).T, "k.", markersize=2)
  panel.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=[], yticks=[])
  return plotting.rendered(figure)


def distances(points_N: np.ndarray, real_N: np.ndarray) -> dict[str, float]:
  """Mean distance of samples to the nearest data point, and of data points to the nearest sample."""
  import sklearn.neighbors

  def mean_nearest(a, b):
    tree = sklearn.neighbors.NearestNeighbors(n_neighbors=1).fit(b.reshape(len(b), -1))
    return float(tree.kneighbors(a.reshape(len(a), -1))[0].mean())

  return {"to_data": mean_nearest(points_N, real_N), "from_data": mean_nearest(real_N, points_N)}


def potential(f_GxGx2: np.ndarray, spacing: float) -> np.ndarray:
  """Energy on a grid whose differences are nearest to a field, by least squares; its minimum is 0.

  Args:
    f_GxGx2: the field (x and y component) at rows y and columns x of a square grid.
    spacing: between neighbouring grid points.
  """
  import scipy.sparse
  import scipy.sparse.linalg

  G = len(f_GxGx2)
  difference = scipy.sparse.diags_array([-1.0, 1.0], offsets=[0, 1], shape=(G - 1, G)) / spacing
  along_x, along_y = (
    scipy.sparse.kron(scipy.sparse.eye(G), difference),
    scipy.sparse.kron(difference, scipy.sparse.eye(G)),
  )
  slopes_x = (f_GxGx2[:, 1:, 0] + f_GxGx2[:, :-1, 0]) / 2
  slopes_y = (f_GxGx2[1:, :, 1] + f_GxGx2[:-1, :, 1]) / 2
  slopes = np.concatenate([slopes_x.ravel(), slopes_y.ravel()])
  values = scipy.sparse.linalg.lsqr(scipy.sparse.vstack([along_x, along_y]).tocsr(), slopes)[0]
  return (values - values.min()).reshape(G, G)


def _on_grid(field, grid_GxGx2: np.ndarray) -> np.ndarray:
  x = jnp.asarray(grid_GxGx2.reshape(-1, *SHAPE))
  if isinstance(field, oracle.OracleField):  # its memory grows with points times data: in parts
    f = jax.lax.map(field, x.reshape(CELLS, CELLS, *SHAPE))
  else:
    f = jax.jit(lambda field, x: field(x))(field, x)
  return np.asarray(f).reshape(CELLS, CELLS, 2)


def _plot_field(panel: "matplotlib.axes.Axes", grid_GxGx2: np.ndarray, f_GxGx2: np.ndarray, title: str):
  norm_GxG = np.linalg.norm(f_GxGx2, axis=-1)
  extent = (-REACH, REACH, -REACH, REACH)
  panel.imshow(norm_GxG, origin="lower", extent=extent, cmap="magma")
  some = (slice(None, None, 3),) * 2
  direction = -f_GxGx2[some] / (norm_GxG[some][..., None] + 1e-6)
  panel.quiver(*np.moveaxis(grid_GxGx2[some], -1, 0), *np.moveaxis(direction, -1, 0), color="white", scale=35)
  panel.set_title(title)


def _x(x: jax.Array, norm_B: jax.Array) -> jax.Array:
  return x
