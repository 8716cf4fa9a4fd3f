"""A small convolutional classifier, whose features replace Inception's where images are small."""

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTH = 64
SPATIAL_CHANNELS = 7  # as many as sFID takes of Inception


class Classifier(nn.Module):
  """Images [B, H, W, C] in [−1, 1] → features and logits, in float32."""

  num_classes: int

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    """The features "pool" [B, 64] and "spatial" [B, h·w·7], and "logits" [B, num_classes]."""
    x = nn.relu(nn.Conv(WIDTH // 2, (3, 3), precision="highest")(images))
    for _ in range(2):
      x = nn.relu(nn.Conv(WIDTH, (3, 3), strides=2, precision="highest")(x))
    pool = nn.relu(nn.Dense(WIDTH, precision="highest")(x.reshape(len(x), -1)))
    pool = nn.LayerNorm(use_bias=False, use_scale=False)(pool)  # the kernel distance depends on the scale
    logits = nn.Dense(self.num_classes, precision="highest")(pool)
    spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
    return {"pool": pool, "spatial": spatial, "logits": logits.astype(jnp.float32)}
