"""Update rules: how one sample moves, given the gradient.

    gd        x ← x − η·f(x)
    nag       x ← x − η·f(x + μ·(x − x_prev))                    (EqM paper, section 3.3)
    nesterov  v ← μ·v − η·f(x + μ·v),  x ← x + v                 (Nesterov 1983)
    adam      x ← x − η·m̂/(√v̂ + ε)                               (Kingma & Ba 2015)
    lbfgs     x ← x − η·H·f(x), H from the last ten steps         (Liu & Nocedal 1989, no line search)
    langevin  x ← x − η·f(x) + √(2·η·T)·ξ                        (temperature T)

The paper's NAG looks ahead along the last displacement only and updates from x; the
classical velocity accumulates.

A rule is written for one sample. The samplers vmap it: every sample has a state of
its own, and a slot that takes a new sample starts from a fresh one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from eqm_jax import checks
from eqm_jax.equilibrium.pytrees import Scalar, concrete, is_traced


@flax.struct.dataclass
class Settings:
  """The numbers of a rule: arguments of the compiled loop, not constants in it."""

  step_size: Callable  # NFE so far → η
  momentum: jax.Array  # μ
  temperature: jax.Array  # T


class UpdateRule(NamedTuple):
  """Three functions of one sample."""

  init: Callable  # x → state
  lookahead: Callable  # (x, state, settings) → where f is evaluated
  update: Callable  # (x, f, state, step_size, settings, key) → (x, state)


def _stateless(x):
  return ()


def _at_x(x, state, settings):
  return x


def _gd(x, f, state, step_size, settings, key):
  return x - step_size * f, state


def _along_displacement(x, displacement, settings):
  return x + settings.momentum * displacement


def _nag(x, f, displacement, step_size, settings, key):
  return x - step_size * f, -step_size * f


def _nesterov(x, f, velocity, step_size, settings, key):
  velocity = settings.momentum * velocity - step_size * f
  return x + velocity, velocity


def _langevin(x, f, state, step_size, settings, key):
  noise = jax.random.normal(key, x.shape, x.dtype)
  return x - step_size * f + jnp.sqrt(2 * step_size * settings.temperature) * noise, state


def _preconditioned(transformation: optax.GradientTransformation, x, f, state, step_size, settings, key):
  """For optax's `scale_by_...`, which give the direction to subtract."""
  direction, state = transformation.update(f, state, x)
  return x - step_size * direction, state


def _optax(transformation: optax.GradientTransformation, x, f, state, step_size, settings, key):
  displacement, state = transformation.update(f, state, x)
  return x + step_size * displacement, state


_adam, _lbfgs = optax.scale_by_adam(), optax.scale_by_lbfgs(memory_size=10)

RULES = {
  "gd": UpdateRule(_stateless, _at_x, _gd),
  "nag": UpdateRule(jnp.zeros_like, _along_displacement, _nag),
  "nesterov": UpdateRule(jnp.zeros_like, _along_displacement, _nesterov),
  "adam": UpdateRule(_adam.init, _at_x, functools.partial(_preconditioned, _adam)),
  "lbfgs": UpdateRule(_lbfgs.init, _at_x, functools.partial(_preconditioned, _lbfgs)),
  "langevin": UpdateRule(_stateless, _at_x, _langevin),
}
WITH_MOMENTUM = ("nag", "nesterov")


@functools.cache
def _from_optax(transformation: optax.GradientTransformation) -> UpdateRule:
  return UpdateRule(transformation.init, _at_x, functools.partial(_optax, transformation))


def resolve(
  rule: str | UpdateRule | optax.GradientTransformation, momentum: Scalar, temperature: Scalar, example: Any
) -> UpdateRule:
  """The update rule of a name or of an optax transformation, or a rule itself.

  Args:
    rule: a key of RULES, an `UpdateRule` (make it once: another one compiles again), or an optax transformation.
    momentum, temperature: checked to belong to it, and to lie in their ranges unless they are traced.
    example: the shape of one sample (a ShapeDtypeStruct), on which the rule is tried.

  Raises:
    ValueError: for an unknown name, a number outside its range, or a transformation
      that needs more than gradient and parameters.
  """
  _check_momentum(rule, concrete(momentum))
  _check_temperature(rule, concrete(temperature))
  if isinstance(rule, str):
    if rule not in RULES:
      raise ValueError(f"rule {rule!r} is not known: give one of {', '.join(RULES)}, or an optax transformation")
    return RULES[rule]
  if isinstance(rule, UpdateRule):
    return rule
  if not isinstance(rule, optax.GradientTransformation):
    raise ValueError(
      f"rule {rule!r} is neither a name, an UpdateRule nor an optax.GradientTransformation: give one of "
      f"{', '.join(RULES)}"
    )
  try:
    jax.eval_shape(lambda x: rule.update(x, rule.init(x), x), example)
  except TypeError as error:
    raise ValueError(
      f"this optax rule needs more than a gradient and x ({error}), such as the value of a loss, "
      "which a field does not have. For L-BFGS, use rule='lbfgs'"
    ) from error
  return _from_optax(rule)


def _check_momentum(rule, momentum: Scalar):
  named = isinstance(rule, str) and rule in WITH_MOMENTUM
  has_momentum = named or isinstance(rule, UpdateRule)  # one of the caller's may use it or not
  if is_traced(momentum):
    if not has_momentum:
      raise ValueError(f"a traced momentum belongs to {' and '.join(WITH_MOMENTUM)}; rule {_name(rule)} takes none")
    return
  checks.in_interval("momentum", momentum, 0, 1, open_high=True)
  if momentum and not has_momentum:
    raise ValueError(f"momentum = {momentum} belongs to {' and '.join(WITH_MOMENTUM)}; rule {_name(rule)} takes none")
  if named and not momentum:
    raise ValueError(f"momentum = 0 makes rule {rule!r} plain gradient descent: give a momentum above 0, or rule='gd'")


def _check_temperature(rule, temperature: Scalar):
  checks.at_least("temperature", temperature, 0)
  has_temperature = isinstance(rule, UpdateRule) or rule == "langevin"
  if not has_temperature and (is_traced(temperature) or temperature):
    raise ValueError(f"temperature = {temperature} belongs to rule 'langevin'; rule {_name(rule)} takes none")


def _name(rule) -> str:
  return repr(rule) if isinstance(rule, str) else "of optax"
