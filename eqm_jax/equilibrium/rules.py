"""Rules: how one sample moves, given the gradient.

    gd        x ← x − η·f(x)
    nag       x ← x − η·f(x + μ·(x − x_prev))                    (EqM paper, section 3.3)
    nesterov  v ← μ·v − η·f(x + μ·v),  x ← x + v                 (Nesterov 1983)
    adam      x ← x − η·m̂/(√v̂ + ε)                               (Kingma & Ba 2015)
    lbfgs     x ← x − η·H·f(x), H from the last ten steps         (Liu & Nocedal 1989, no line search)
    langevin  x ← x − η·f(x) + √(2·η·T)·ξ                        (temperature T)

The paper's NAG looks ahead along the last displacement only and updates from x; the
classical velocity accumulates.

A rule is written for one sample; the loops vmap it, so every sample has a memory of
its own, and a slot that takes a new sample starts clean.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class Settings:
  """The numbers of a rule; arguments of the compiled loop, not constants in it."""

  step_size: Callable  # evaluations so far → η
  momentum: jax.Array  # μ
  temperature: jax.Array  # T


class Rule(NamedTuple):
  """Three functions of one sample."""

  init: Callable  # x → memory
  look: Callable  # (x, memory, settings) → where f is evaluated
  move: Callable  # (x, f, memory, step_size, settings, key) → (x, memory)


def _nothing(x):
  return ()


def _here(x, memory, settings):
  return x


def _gd(x, f, memory, step_size, settings, key):
  return x - step_size * f, memory


def _look_ahead(x, displacement, settings):
  return x + settings.momentum * displacement


def _nag(x, f, displacement, step_size, settings, key):
  return x - step_size * f, -step_size * f


def _nesterov(x, f, velocity, step_size, settings, key):
  velocity = settings.momentum * velocity - step_size * f
  return x + velocity, velocity


def _langevin(x, f, memory, step_size, settings, key):
  noise = jax.random.normal(key, x.shape, x.dtype)
  return x - step_size * f + jnp.sqrt(2 * step_size * settings.temperature) * noise, memory


def _preconditioned(transformation: optax.GradientTransformation, x, f, memory, step_size, settings, key):
  """For optax's `scale_by_...`, which give the direction to subtract."""
  direction, memory = transformation.update(f, memory, x)
  return x - step_size * direction, memory


def _optax(transformation: optax.GradientTransformation, x, f, memory, step_size, settings, key):
  update, memory = transformation.update(f, memory, x)
  return x + step_size * update, memory


_adam, _lbfgs = optax.scale_by_adam(), optax.scale_by_lbfgs(memory_size=10)

RULES = {
  "gd": Rule(_nothing, _here, _gd),
  "nag": Rule(jnp.zeros_like, _look_ahead, _nag),
  "nesterov": Rule(jnp.zeros_like, _look_ahead, _nesterov),
  "adam": Rule(_adam.init, _here, functools.partial(_preconditioned, _adam)),
  "lbfgs": Rule(_lbfgs.init, _here, functools.partial(_preconditioned, _lbfgs)),
  "langevin": Rule(_nothing, _here, _langevin),
}
WITH_MOMENTUM = ("nag", "nesterov")


@functools.cache
def _from_optax(transformation: optax.GradientTransformation) -> Rule:
  return Rule(transformation.init, _here, functools.partial(_optax, transformation))


def resolve(rule: str | optax.GradientTransformation, momentum: float, temperature: float, example: Any) -> Rule:
  """The rule that an argument names.

  Args:
    rule: a key of RULES, or an optax transformation.
    momentum, temperature: checked to belong to it.
    example: the shape of one sample (a ShapeDtypeStruct), on which the rule is tried.

  Raises:
    ValueError: for an unknown name, a number outside its range, or a transformation
      that needs more than gradient and parameters.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum = {momentum} must lie in [0, 1)")
  if momentum and rule not in WITH_MOMENTUM:
    raise ValueError(f"momentum = {momentum} belongs to {' and '.join(WITH_MOMENTUM)}; rule {_name(rule)} takes none")
  if not temperature >= 0 or (temperature and rule != "langevin"):
    raise ValueError(
      f"temperature = {temperature} must be at least 0, and belongs to rule 'langevin', not {_name(rule)}"
    )
  if isinstance(rule, str):
    if rule not in RULES:
      raise ValueError(f"rule {rule!r} is not known: give one of {', '.join(RULES)}, or an optax transformation")
    return RULES[rule]
  if not isinstance(rule, optax.GradientTransformation):
    raise ValueError(f"rule {rule!r} is neither a name nor an optax.GradientTransformation")
  try:
    jax.eval_shape(lambda x: rule.update(x, rule.init(x), x), example)
  except TypeError as error:
    raise ValueError(
      f"this optax rule needs more than a gradient and x ({error}), such as the value of a loss, "
      "which a field does not have. For L-BFGS, use rule='lbfgs'"
    ) from error
  return _from_optax(rule)


def _name(rule) -> str:
  return repr(rule) if isinstance(rule, str) else "of optax"
