"""Continuous batching: N samples through a few slots, so that compute goes only where it is needed.

With static batching, a batch runs until its slowest sample is done. Here a sample that is done
is written to its place in the output and its slot takes the next one from the queue,
all inside one jitted loop. When the queue is empty and half of the slots idle, the samples that
are left are gathered and the loop goes on with half as many slots.

On a mesh every device runs a queue of its own; nothing is communicated in the loop.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqm_jax.equilibrium import meshes, reports, sampler, update_rules
from eqm_jax.equilibrium.field import BoundField
from eqm_jax.equilibrium.pytrees import Scalar, as_pytree

HALVINGS = 1  # how often the slots may shrink at the end; each width is compiled on its own, and saves ever less


@flax.struct.dataclass
class StreamState:
  """Slots, queue and output of one device. A slot whose place is not in the queue is idle."""

  slots: sampler.DescentState  # [S, ...]
  labels: Any  # of the samples in the slots
  place: jax.Array  # where each slot's sample stands in the queue and in the output, [S]
  next_place: jax.Array  # int32: the first sample that no slot has taken
  output: sampler.Result  # [n, ...]
  executed_nfe: jax.Array


@flax.struct.dataclass
class Queue:
  """The samples of one device. What comes after them only fills up the shape."""

  index: jax.Array  # [n]: the sample's index among all, which fixes its random numbers; negative: no sample
  labels: Any
  threshold: jax.Array


def descend_stream(
  field: Callable,
  labels: Any,
  key: jax.Array,
  *,
  shape: tuple[int, ...],
  slots: int,
  step_size: Scalar | str | Callable,
  max_nfe: int,
  momentum: Scalar = 0.0,
  rule: str | update_rules.UpdateRule | optax.GradientTransformation = "gd",
  threshold: Scalar = 0.0,
  stop: str = "norm",
  min_nfe: int = 0,
  multiplier: Scalar = 1.0,
  temperature: Scalar = 0.0,
  max_restarts: int = 0,
  mesh: Mesh | None = None,
  index: np.ndarray | None = None,
  dtype: Any = jnp.float32,
  progress: reports.Progress | None = None,
) -> sampler.Result:
  """One sample per label, from start noise that depends on (key, sample index) alone.

  Sample i is the one that `descend` would give from `start_noise(key, [i], shape)`,
  whatever the number of slots and devices (to rounding: another batch size may sum in
  another order). It can be transformed as `descend` can: not differentiated in reverse.

  Args:
    field: (x [S, *shape], labels [S]) → f [S, *shape], such as `eqm_jax.field(model, params)`; with stop="gamma" →
      (f, γ̂ [S]).
    labels: int [N], or any tree of arrays with leading axis N that `field` takes.
    key: fixes all random numbers.
    shape: of one sample, (H, W, C).
    slots: samples in flight, over all devices; at most N. N ≥ 8·slots keeps the
      hardware busy.
    threshold: one number, or one per sample [N].
    mesh: splits slots and samples over all its devices, the first ones to the first; weights are replicated. Its axes
      may be of any type (Auto or Explicit); those of the result are Auto.
    index: int [N], the samples' indices, to draw a large sample set chunk by chunk; None: 0, 1, .... Negative ones are
      no samples and cost nothing: they fill up the queues of devices, where they come last, and leave zeros.
    dtype: of the samples, float32 or float64.
    progress: takes the number of samples that are done since it was last called, while the stream goes on, such as
      `update` of a `tqdm.auto.tqdm(total=N)`. None costs nothing; another function compiles nothing anew.

  The other arguments are those of `descend`.

  Returns:
    A `Result`, in the order of the labels, with its `executed_nfe`. On the devices it takes the memory
    of the output and the slots; no trajectory is kept.

  Raises:
    ValueError: before compilation, if N or slots are not positive, slots exceed N or
      do not divide over the devices, or for what `descend` refuses.
  """
  if isinstance(field, BoundField):
    raise ValueError("the field has its labels bound, but its slots change theirs: make the field without labels")
  N = _count(labels)
  num_devices = mesh.size if mesh else 1
  if not 1 <= slots <= N:
    raise ValueError(f"slots = {slots} must lie between 1 and the number of samples, {N}")
  if slots % num_devices:
    raise ValueError(f"slots = {slots} do not divide over {num_devices} devices: use a multiple of {num_devices}")
  policy = sampler.make_policy(
    jax.ShapeDtypeStruct(tuple(shape), dtype), rule=rule, step_size=step_size, momentum=momentum,
    temperature=temperature, key=key, max_nfe=max_nfe, min_nfe=min_nfe, max_restarts=max_restarts,
    multiplier=multiplier, stop=stop,
  )  # fmt: skip
  samples = (labels, index, threshold)
  options = dict(slots=slots // num_devices, shape=tuple(shape))
  if mesh is None:
    field = as_pytree(field)
    draw = functools.partial(_draw, field, samples, policy, mesh=None, **options)
    with meshes.known_devices(next(iter(jax.tree.leaves(field)), None), (field, samples, policy)):
      return reports.reporting(progress, N, draw)
  mesh = meshes.with_auto_axes(mesh)
  with meshes.auto_context(mesh):
    field = jax.device_put(as_pytree(field), NamedSharding(mesh, PartitionSpec()))
    draw = functools.partial(_draw, field, *meshes.onto(mesh, (samples, policy)), mesh=mesh, **options)
    return reports.reporting(progress, N, draw)


def _draw(field, samples, policy, reporter, *, mesh, **options) -> sampler.Result:
  """The results of all devices, without what only fills up their queues."""
  labels, index, threshold = samples
  N = _count(labels)
  threshold_N = sampler.check_threshold(threshold, N, policy.stop)
  queue = _queue(labels, index, threshold_N, mesh.size if mesh else 1)
  result = _stream(field, queue, policy, reporter, mesh=mesh, **options)
  executed_nfe = result.executed_nfe.sum()
  if len(queue.index) > N:
    result = jax.tree.map(lambda leaf: leaf[:N], result)
  return result.replace(executed_nfe=executed_nfe)


def _count(labels: Any) -> int:
  """The number of samples."""
  sizes = {len(leaf) for leaf in jax.tree.leaves(labels)}
  if len(sizes) != 1 or 0 in sizes:
    raise ValueError(f"labels have leading sizes {sorted(sizes)}: give at least one label, and one for every sample")
  return sizes.pop()


def _queue(labels: Any, index: np.ndarray | None, threshold: jax.Array, num_devices: int) -> Queue:
  """The queues of all devices, of one length, one after another."""
  N = len(threshold)
  index_n = np.full(-(-N // num_devices) * num_devices, -1, np.int32)
  index_n[:N] = np.arange(N) if index is None else index
  order = np.minimum(np.arange(len(index_n)), N - 1)
  return Queue(
    index=jnp.asarray(index_n),
    labels=jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], labels),
    threshold=threshold[order],
  )


@functools.partial(jax.jit, static_argnames=("slots", "shape", "mesh"))
def _stream(field, queue, policy, reporter, *, slots, shape, mesh) -> sampler.Result:
  run = functools.partial(_run_queue, slots=slots, shape=shape)
  if mesh:
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    # Queues differ in length: the loops of the devices take different numbers of turns.
    run = jax.shard_map(run, mesh=mesh, in_specs=(whole, split, whole, whole), out_specs=split, check_vma=False)
  return run(field, queue, policy, reporter)


def _run_queue(
  field, queue: Queue, policy: sampler.Policy, reporter: reports.Reporter | None, *, slots: int, shape: tuple[int, ...]
) -> sampler.Result:
  """All samples of one device: their results [n], and its executed NFE [1]."""
  n = len(queue.index)
  count = jnp.sum(queue.index >= 0)
  dtype = policy.settings.momentum.dtype

  def take(place_S):
    """The samples at these places of the queue, unmoved, and their labels."""
    safe_S = jnp.minimum(place_S, n - 1)
    index_S = queue.index[safe_S]
    x0 = sampler.start_noise(policy.key, index_S, shape, dtype)
    samples = sampler.start(x0, index_S, queue.threshold[safe_S], policy)
    # An idle slot is one that does not run.
    status_S = jnp.where(place_S < count, samples.status, sampler.Status.CONVERGED)
    return samples.replace(status=status_S), jax.tree.map(lambda leaf: leaf[safe_S], queue.labels)

  def turn(state: StreamState) -> StreamState:
    """One evaluation in every slot; finished samples go out, the next ones come in."""
    moved = sampler.advance(state.slots, field(sampler.lookahead(state.slots, policy), state.labels), policy)
    done_S = ~sampler.is_running(moved) & (state.place < count)
    target_S = jnp.where(done_S, state.place, n)  # n is outside: dropped
    output = jax.tree.map(lambda rows, value: rows.at[target_S].set(value, mode="drop"), state.output, _results(moved))
    place_S = jnp.where(done_S, state.next_place + jnp.cumsum(done_S) - 1, state.place)

    def refill(old):
      return jax.tree.map(functools.partial(sampler.where, done_S), take(place_S), old)

    samples, labels_S = jax.lax.cond(jnp.any(done_S), refill, lambda old: old, (moved, state.labels))
    next_place = state.next_place + jnp.sum(done_S)
    reports.report(reporter, state.next_place - slots, next_place - slots)
    return StreamState(
      slots=samples,
      labels=labels_S,
      place=place_S,
      next_place=next_place,
      output=output,
      executed_nfe=state.executed_nfe + len(place_S),
    )

  place_S = jnp.arange(slots)
  first, labels_S = take(place_S)
  output = jax.tree.map(lambda leaf: jnp.zeros((n, *leaf.shape[1:]), leaf.dtype), _results(first))
  state = StreamState(first, labels_S, place_S, jnp.asarray(slots), output, jnp.zeros((), jnp.int32))

  for width in [slots >> k for k in range(HALVINGS + 1) if slots >> k]:
    narrower = width // 2 if width > 1 and width > slots >> HALVINGS else 0
    state = jax.lax.while_loop(functools.partial(_more_than, narrower, count), turn, _narrowed(state, count, width))
  reports.report_rest(reporter, count)
  return state.output.replace(executed_nfe=state.executed_nfe[None])


def _results(samples: sampler.DescentState) -> sampler.Result:
  return sampler.Result(samples.x, samples.nfe, samples.norm, samples.status, samples.restarts, gamma=samples.gamma)


def _more_than(number: int, count: jax.Array, state: StreamState) -> jax.Array:
  return jnp.sum(state.place < count) > number


def _narrowed(state: StreamState, count: jax.Array, width: int) -> StreamState:
  """The same with `width` slots: busy ones move to the front, idle ones fall away."""
  keep = jnp.argsort(state.place >= count, stable=True)[:width]
  samples, labels_S, place_S = jax.tree.map(lambda leaf: leaf[keep], (state.slots, state.labels, state.place))
  return state.replace(slots=samples, labels=labels_S, place=place_S)
