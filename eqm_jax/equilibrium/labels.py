"""Labels: the classes that a field or an energy is told."""

import jax
import jax.numpy as jnp
import numpy as np


def checked_labels(label_B: jax.Array, num_classes: int) -> jax.Array:
  """Labels as an array, if the model knows them all."""
  # Values of a traced array are not known; whoever traces checks before. In numpy, which no trace records.
  if not isinstance(label_B, jax.core.Tracer):
    label_B = np.asarray(label_B)
    if label_B.size and np.issubdtype(label_B.dtype, np.integer):
      low, high = label_B.min(), label_B.max()
      if low < 0 or high > num_classes:
        known = f"0..{num_classes - 1}, and {num_classes} for no class"
        raise ValueError(f"labels span {low}..{high}, but the model knows {known}")
  if label_B.ndim not in (1, 2) or not jnp.issubdtype(label_B.dtype, jnp.integer):
    raise ValueError(f"labels must be integers of shape [B] or [B, K], not {label_B.dtype}{list(label_B.shape)}")
  return jnp.asarray(label_B)
