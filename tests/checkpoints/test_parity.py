"""Agreement with the authors' code. `pytest tests/checkpoints/test_parity.py -n 0 -s` prints the table.

In float32 to 1e-5 of the largest value, in float64 to 1e-10, but to 1e-6 for gradients, which are stored in float32.
Gradients of explicit energies are second derivatives: in float32 to 1e-4.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqm_jax
from eqm_jax.checkpoints import eqm_torch as convert
from eqm_jax.equilibrium import energy, objective

SCHEDULE = objective.Schedule()


def computed(reference, dtype, second):
  """Triples (name, ours, theirs) of every array that is compared."""
  image = functools.partial(reference.image, dtype=dtype)
  pretrained = {
    weights: eqm_jax.load(reference.checkpoint, weights=weights, num_heads=reference.heads, dtype=np.dtype(dtype).name)
    for weights in ("model", "ema")
  }
  model = pretrained["model"].model
  params, ema = (jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), pretrained[w].params) for w in ("model", "ema"))
  field = functools.partial(eqm_jax.field, model, params)
  apply = jax.jit(lambda function, x: function(x))
  label, guided_label = reference.label("y"), reference.label("y_guided")
  null = jnp.full_like(guided_label, model.num_classes)
  x = image("x")
  rows = [("forward", apply(field(label), x), -image("forward"))]
  if "forward_ema" in reference.arrays:
    rows.append(("forward_ema", apply(eqm_jax.field(model, ema, label), x), -image("forward_ema")))
  rows.append(("forward_cond", apply(field(guided_label), x), -image("forward_cond")))
  rows.append(("forward_null", apply(field(null), x), -image("forward_null")))
  for scale in (1.5, 4.0):
    guided = field(guided_label, guidance=scale, guidance_channels=3)
    rows.append((f"guided_3ch_{scale}", apply(guided, x), -image(f"guided_3ch_{scale}")))

  gamma = jnp.asarray(reference["gamma"], dtype)
  rows.append(("c_of_gamma", eqm_jax.magnitude(gamma, SCHEDULE), reference["c_of_gamma"]))
  data, noise = image("train_data"), image("train_noise")
  gamma, train_label = jnp.asarray(reference["train_gamma"], dtype), reference.label("train_y")
  rows.append(("xt", eqm_jax.corrupt(data, noise, gamma), image("xt")))
  rows.append(("target", objective.target_gradient(data, noise, gamma, SCHEDULE), -image("target")))
  rows += losses(reference, model, params, data, noise, gamma, train_label, second)

  for form in ("dot", "l2"):
    rows.append((f"energy_{form}", apply(eqm_jax.energy(model, params, label, form), x), reference[f"energy_{form}"]))
    rows.append((f"field_{form}", apply(field(label, form=form), x), -image(f"field_{form}")))

  for scale in (1.0, 1.5):
    for name, rule, momentum in (("gd", "gd", 0.0), ("ngd", "nag", float(reference["mu"]))):
      descend = functools.partial(
        eqm_jax.descend, field(guided_label, guidance=scale, guidance_channels=3), image("z"),
        step_size=float(reference["eta"]), momentum=momentum, rule=rule,
      )  # fmt: skip
      trajectory = jnp.stack([image("z"), *(descend(max_nfe=k).x for k in range(1, 11))])
      rows.append((f"traj_{name}_{scale}", trajectory, image(f"traj_{name}_{scale}")))
  return rows


def losses(reference, model, params, data, noise, gamma, label, second):
  def implicit(weight):
    def loss(params):
      def field_fn(x):
        return model.apply({"params": params}, x, label, return_tokens=True)

      loss_B, tokens = objective.equilibrium_loss(field_fn, data, noise, gamma, SCHEDULE, has_aux=True)
      dispersive = objective.dispersive_loss(tokens)
      return jnp.mean(loss_B) + weight * dispersive, (loss_B, dispersive)

    return loss

  def explicit(form, gradient):
    def loss(params):
      loss_B = objective.equilibrium_loss(
        lambda x: gradient(model, form, params, x, label), data, noise, gamma, SCHEDULE
      )
      return jnp.mean(loss_B), (loss_B, None)

    return loss

  rows = []
  losses = [("none", implicit(0.0)), ("none_disp", implicit(0.5))]
  # Another test compares the two orders of differentiation; here each network has one of them.
  order = "reverse_over_reverse" if reference.name == "eqm_tiny" else "forward_over_reverse"
  forms = ("dot", "l2") if second or reference.name == "eqm_tiny" else ()
  losses += [(form, explicit(form, energy.SECOND_ORDER[order])) for form in forms]
  for name, loss in losses:
    (total, (loss_B, dispersive)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    rows.append((f"loss_{name}", total, reference[f"loss_{name}"]))
    rows.append((f"loss_per_sample_{name}", loss_B, reference[f"loss_per_sample_{name}"]))
    if dispersive is not None and name != "none":
      rows.append(("dispersive", dispersive, reference["dispersive"]))
    # The last layer is negated in theirs, and its gradient with it: the conversion does both.
    for parameter, ours in convert.to_state_dict(model, gradient).items():
      if parameter != convert.POSITIONS:
        rows.append((f"grad_{name}/{parameter}", ours, reference[f"grad_{name}/{parameter}"]))
  return rows


@pytest.mark.parametrize(
  "dtype, tolerance, second",
  [
    pytest.param(np.float32, 1e-5, False, id="float32", marks=pytest.mark.slow),
    pytest.param(np.float64, 1e-10, False, id="float64"),
    # Second derivatives take long to compile: without this they are compared for one of the networks.
    pytest.param(np.float64, 1e-10, True, id="float64-second", marks=pytest.mark.slow),
  ],
)
def test_every_array_agrees(reference, dtype, tolerance, second):
  with jax.enable_x64(dtype == np.float64):
    rows = computed(reference, dtype, second)
  print(f"\n{reference.name}, {np.dtype(dtype).name}: array, largest error relative to the largest value")
  wrong = []
  for name, ours, theirs in rows:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, name
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    allowed = max(tolerance, 1e-6) if name.startswith("grad_") else tolerance
    if name.startswith(("grad_dot", "grad_l2")):
      allowed *= 10
    print(f"  {name:58s} {error:8.1e}")
    if not error <= allowed:
      wrong.append((name, error))
  assert not wrong
  compared = {name for name, _, _ in rows}
  inputs = {"x", "y", "y_guided", "gamma", "z", "eta", "mu", "config"}
  skipped = ("train_",) if second or reference.name == "eqm_tiny" else ("train_", "loss_", "grad_")
  left = [key for key in reference.arrays if key not in compared | inputs and not key.startswith(skipped)]
  assert not left, f"not compared: {left}"
