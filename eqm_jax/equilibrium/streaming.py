"""Streaming: N samples through a few slots, so that compute goes only where it is needed.

In lockstep, a batch runs until its slowest sample is done. Here a sample that is done
is written to its place in the output and its slot takes the next one from the queue,
all inside one jitted loop. When the queue is empty and half of the slots idle, those
that are left move together and the loop goes on with half as many slots.

On a mesh every device runs a queue of its own; nothing is communicated in the loop.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqm_jax.equilibrium import sampler
from eqm_jax.equilibrium.field import as_pytree

HALVINGS = 1  # how often the slots may shrink at the end; each width is compiled on its own, and saves ever less


@flax.struct.dataclass
class StreamResult(sampler.Result):
  """A `Result`, and what it took."""

  hardware_evaluations: jax.Array = None  # int32 scalar: samples that passed through the field, idle slots included


@flax.struct.dataclass
class StreamState:
  """Slots, queue and output of one device. A slot whose place is not in the queue is idle."""

  slots: sampler.DescentState  # [S, ...]
  label_S: Any
  place_S: jax.Array  # where each slot's sample stands in the queue and in the output
  next_place: jax.Array  # int32: the first sample that no slot has taken
  output: sampler.Result  # [n, ...]
  hardware_evaluations: jax.Array


@flax.struct.dataclass
class Queue:
  """The samples of one device. What comes after them only fills up the shape."""

  index_n: jax.Array  # the sample's index among all, which fixes its random numbers; negative: no sample
  label_n: Any
  threshold_n: jax.Array


def descend_stream(
  field_fn: Callable,
  labels_N: Any,
  key: jax.Array,
  *,
  shape: tuple[int, ...],
  slots: int,
  step_size: float | str | Callable,
  momentum: float = 0.0,
  rule: str | optax.GradientTransformation = "nag",
  max_evaluations: int,
  threshold: float | jax.Array = 0.0,
  min_evaluations: int = 0,
  multiplier: float = 1.0,
  temperature: float = 0.0,
  max_restarts: int = 0,
  mesh: Mesh | None = None,
  index_N: np.ndarray | None = None,
  dtype: Any = jnp.float32,
) -> StreamResult:
  """Draws one sample per label, from start noise that depends on (key, sample index) alone.

  Sample i is the one that `descend` would give from `start_noise(key, [i], shape)`,
  whatever the number of slots and devices (to rounding: another batch size may sum in
  another order).

  Args:
    field_fn: (x [S, *shape], labels [S]) → f [S, *shape], such as `conditional_field`.
    labels_N: int [N], or any tree of arrays with leading axis N that `field_fn` takes.
    key: fixes all random numbers.
    shape: of one sample, (H, W, C).
    slots: samples in flight, over all devices; at most N. N ≥ 8·slots keeps the
      hardware busy.
    threshold: one number, or one per sample [N].
    mesh: splits slots and samples over all its devices, the first ones to the first; weights are replicated.
    index_N: int [N], the samples' indices, to draw a long series part by part; None: 0, 1, .... Negative ones are
      no samples and cost nothing: they fill up the queues of devices, where they come last, and leave zeros.
    dtype: of the samples, float32 or float64.

  The other arguments are those of `descend`.

  Returns:
    A `StreamResult`, in the order of the labels. On the devices it takes the memory
    of the output and the slots; no trajectory is kept.

  Raises:
    ValueError: before compilation, if N or slots are not positive, slots exceed N or
      do not divide over the devices, or for what `descend` refuses.
  """
  sizes = {len(leaf) for leaf in jax.tree.leaves(labels_N)}
  if len(sizes) != 1 or 0 in sizes:
    raise ValueError(f"labels_N has leading sizes {sorted(sizes)}: give at least one label, and one for every sample")
  (N,) = sizes
  devices = mesh.size if mesh else 1
  if not 1 <= slots <= N:
    raise ValueError(f"slots = {slots} must lie between 1 and the number of samples, {N}")
  if slots % devices:
    raise ValueError(f"slots = {slots} do not divide over {devices} devices: use a multiple of {devices}")
  threshold_N = sampler.checked_threshold(threshold, N)
  policy = sampler.make_policy(
    rule, step_size, momentum, temperature, key, max_evaluations, min_evaluations, max_restarts, multiplier,
    example=jax.ShapeDtypeStruct(tuple(shape), dtype),
  )  # fmt: skip

  filled_N = np.full(-(-N // devices) * devices, -1, np.int32)  # queues of one length
  filled_N[:N] = np.arange(N) if index_N is None else index_N
  order = np.minimum(np.arange(len(filled_N)), N - 1)
  queue = Queue(
    index_n=jnp.asarray(filled_N),
    label_n=jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], labels_N),
    threshold_n=threshold_N[order],
  )
  field_fn = as_pytree(field_fn)
  if mesh:
    field_fn = jax.device_put(field_fn, NamedSharding(mesh, PartitionSpec()))
  output, hardware_evaluations = _stream(field_fn, queue, policy, slots // devices, tuple(shape), mesh)
  if len(filled_N) > N:
    output = jax.tree.map(lambda leaf: leaf[:N], output)
  fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
  return StreamResult(**fields, hardware_evaluations=hardware_evaluations.sum())


@functools.partial(jax.jit, static_argnames=("slots", "shape", "mesh"))
def _stream(field_fn, queue, policy, slots, shape, mesh):
  run = functools.partial(_run_queue, slots=slots, shape=shape)
  if mesh:
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    # Queues differ in length: the loops of the devices take different numbers of turns.
    run = jax.shard_map(run, mesh=mesh, in_specs=(whole, split, whole), out_specs=split, check_vma=False)
  return run(field_fn, queue, policy)


def _run_queue(field_fn, queue: Queue, policy: sampler.Policy, *, slots: int, shape: tuple[int, ...]):
  """All samples of one device: → their results [n], and the evaluations done [1]."""
  n = len(queue.index_n)
  count = jnp.sum(queue.index_n >= 0)
  dtype = policy.settings.momentum.dtype

  def take(place_S):
    """The samples at these places of the queue, unmoved, and their labels."""
    safe_S = jnp.minimum(place_S, n - 1)
    index_S = queue.index_n[safe_S]
    x0 = sampler.start_noise(policy.key, index_S, shape, dtype)
    samples = sampler.start(x0, index_S, queue.threshold_n[safe_S], policy.rule)
    # An idle slot is one that does not run.
    status_S = jnp.where(place_S < count, samples.status_B, sampler.CONVERGED)
    return samples.replace(status_B=status_S), jax.tree.map(lambda leaf: leaf[safe_S], queue.label_n)

  def turn(state: StreamState) -> StreamState:
    """One evaluation in every slot; finished samples go out, the next ones come in."""
    moved = sampler.advance(state.slots, field_fn(sampler.look(state.slots, policy), state.label_S), policy)
    done_S = ~sampler.is_running(moved) & (state.place_S < count)
    target_S = jnp.where(done_S, state.place_S, n)  # n is outside: dropped
    output = jax.tree.map(lambda rows, value: rows.at[target_S].set(value, mode="drop"), state.output, _results(moved))
    place_S = jnp.where(done_S, state.next_place + jnp.cumsum(done_S) - 1, state.place_S)

    def refill(old):
      return jax.tree.map(functools.partial(sampler.where, done_S), take(place_S), old)

    slots, label_S = jax.lax.cond(jnp.any(done_S), refill, lambda old: old, (moved, state.label_S))
    return StreamState(
      slots=slots,
      label_S=label_S,
      place_S=place_S,
      next_place=state.next_place + jnp.sum(done_S),
      output=output,
      hardware_evaluations=state.hardware_evaluations + len(place_S),
    )

  place_S = jnp.arange(slots)
  first, label_S = take(place_S)
  output = jax.tree.map(lambda leaf: jnp.zeros((n, *leaf.shape[1:]), leaf.dtype), _results(first))
  state = StreamState(first, label_S, place_S, jnp.asarray(slots), output, jnp.zeros((), jnp.int32))

  for width in [slots >> k for k in range(HALVINGS + 1) if slots >> k]:
    narrower = width // 2 if width > 1 and width > slots >> HALVINGS else 0
    state = jax.lax.while_loop(functools.partial(_more_than, narrower, count), turn, _narrowed(state, count, width))
  return state.output, state.hardware_evaluations[None]


def _results(samples: sampler.DescentState) -> sampler.Result:
  return sampler.Result(samples.x, samples.evaluations_B, samples.norm_B, samples.status_B, samples.restarts_B)


def _more_than(number: int, count: jax.Array, state: StreamState) -> jax.Array:
  return jnp.sum(state.place_S < count) > number


def _narrowed(state: StreamState, count: jax.Array, width: int) -> StreamState:
  """The same with `width` slots: busy ones move to the front, idle ones fall away."""
  keep = jnp.argsort(state.place_S >= count, stable=True)[:width]
  busy = jax.tree.map(lambda leaf: leaf[keep], (state.slots, state.label_S, state.place_S))
  return state.replace(slots=busy[0], label_S=busy[1], place_S=busy[2])
