"""Lists and samples a model of eqm_jax with Orbax and Flax alone; needs nothing of eqm_jax.

    pip install jax flax orbax-checkpoint
    python docs/clients/sample_with_flax.py exported --labels=0,1,2

The model is a directory of `eqm_jax.save_pretrained`, or the workdir of a training run, whose newest checkpoint is
read. The result, an .npz file of `noise`, `labels`, `x` [N, H, W, C] and `nfe` [N], holds images in [-1, 1], or latents
for the autoencoder that the model was trained with.
"""

import argparse
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


def read(path: str, weights: str = "ema_params") -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads the attributes of the network, and its parameters: nested dicts of numpy arrays.

  Args:
    path: a directory of `save_pretrained`, or a workdir.
    weights: of a workdir: "ema_params" or "params".
  """
  directory = pathlib.Path(path).absolute()
  attributes = json.loads((directory / "config.json").read_text())["model"]
  if (directory / "params").is_dir():
    return attributes, restore(directory / "params")
  steps = [step for step in (directory / "checkpoints").iterdir() if step.name.isdigit()]
  newest = max(steps, key=lambda step: int(step.name))
  return attributes, restore(newest / "state", only=weights)[weights]


def restore(directory: pathlib.Path, only: str | None = None) -> dict[str, Any]:
  """Reads a tree of numpy arrays, or one entry of it: the devices that it was saved from need not exist here."""
  handler = ocp.PyTreeCheckpointHandler()
  saved = handler.metadata(directory).tree
  saved = saved if only is None else {only: saved[only]}
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
  return handler.restore(directory, args=ocp.args.PyTreeRestore(shapes, restore_args=as_numpy, partial_restore=True))


def norm(x):
  return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)(x)


class TimeEmbed(nn.Module):
  """The embedding of time 0: a vector, since the network takes no time."""

  width: int

  @nn.compact
  def __call__(self):
    cosine_and_sine = jnp.concatenate([jnp.ones(128), jnp.zeros(128)])
    return nn.Dense(self.width, name="dense_1")(nn.silu(nn.Dense(self.width, name="dense_0")(cosine_and_sine)))


class Block(nn.Module):
  """Attention and an MLP, modulated by the condition."""

  width: int
  num_heads: int
  mlp_ratio: float

  @nn.compact
  def __call__(self, h, condition):
    m = jnp.split(nn.Dense(6 * self.width, name="modulation")(nn.silu(condition))[:, None], 6, axis=-1)
    heads = self.num_heads, self.width // self.num_heads
    qkv = nn.DenseGeneral((3, *heads), name="qkv")(norm(h) * (1 + m[1]) + m[0])
    mixed = nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0))
    h += m[2] * nn.DenseGeneral(self.width, axis=(-2, -1), name="attention_out")(mixed)
    hidden = nn.Dense(round(self.width * self.mlp_ratio), name="mlp_in")(norm(h) * (1 + m[4]) + m[3])
    return h + m[5] * nn.Dense(self.width, name="mlp_out")(nn.gelu(hidden)), None


class Network(nn.Module):
  """f(x | label): the gradient of the landscape, uphill."""

  channels: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  num_classes: int
  mlp_ratio: float
  learn_sigma: bool

  @nn.compact
  def __call__(self, x, label):
    B, H, W, C = x.shape
    p, side = self.patch_size, H // self.patch_size
    patches = x.reshape(B, side, p, side, p, C).swapaxes(2, 3).reshape(B, side * side, p * p * C)
    h = nn.Dense(self.width, name="patch_embed")(patches) + positions(side, self.width)
    condition = TimeEmbed(self.width, name="time_embed")()
    condition += nn.Embed(self.num_classes + 1, self.width, name="label_embed")(label)  # num_classes: no class
    blocks = nn.scan(
      Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth
    )
    h, _ = blocks(self.width, self.num_heads, self.mlp_ratio, name="blocks")(h, condition)
    shift, scale = jnp.split(nn.Dense(2 * self.width, name="final_modulation")(nn.silu(condition))[:, None], 2, axis=-1)
    out_channels = self.channels * (2 if self.learn_sigma else 1)
    f = nn.Dense(p * p * out_channels, name="final_out")(norm(h) * (1 + scale) + shift)
    return f.reshape(B, side, side, p, p, -1).swapaxes(2, 3).reshape(B, H, W, -1)[..., :C]


def positions(side: int, width: int) -> np.ndarray:
  """Sines and cosines of column and row, [side², width]."""
  angles = np.arange(side)[:, None] / 10_000 ** (np.arange(width // 4) / (width / 4))
  line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  return np.concatenate([np.tile(line, (side, 1)), np.repeat(line, side, axis=0)], axis=1).astype(np.float32)


def network_of(attributes: dict[str, Any]) -> Network:
  """The network with the attributes of a config.json."""
  if attributes["energy"] != "none" or attributes["time_input"]:
    raise SystemExit("the model is an explicit energy or takes the time: this script samples implicit fields alone")
  for name, plain in {"qk_norm": False, "norm": "layer", "mlp": "gelu", "rope": False}.items():
    if attributes.get(name, plain) != plain:
      raise SystemExit(f"the model has {name} = {attributes[name]!r}: this script has the paper's network alone")
  return Network(**{name: attributes[name] for name in Network.__annotations__ if name in attributes})


def descend(field, x, step_size: float, max_nfe: int, threshold: float):
  """Gradient descent of each sample until ‖f‖ ≤ threshold, and its number of network calls."""

  def body(state):
    x, nfe, running = state
    f = field(x)
    nfe = nfe + running
    running &= jnp.sqrt(jnp.sum(f**2, axis=(1, 2, 3))) > threshold
    x = jnp.where(running[:, None, None, None], x - step_size * f, x)
    return x, nfe, running & (nfe < max_nfe)

  start = x, jnp.zeros(len(x), jnp.int32), jnp.ones(len(x), bool)
  return jax.lax.while_loop(lambda state: jnp.any(state[2]), body, start)[:2]


def main():
  """Reads the model, lists its parameters, descends from noise and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("path", help="a directory of save_pretrained, or a workdir")
  parser.add_argument("--weights", default="ema_params", choices=("ema_params", "params"), help="of a workdir")
  parser.add_argument("--labels", default="0", help="one for each sample, with commas between")
  parser.add_argument("--step-size", type=float, default=0.003)
  parser.add_argument("--max-nfe", type=int, default=249)
  parser.add_argument("--threshold", type=float, default=0.0, help="‖f‖ at which a sample stops; 0: none does")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", default="samples.npz")
  options = parser.parse_args()

  attributes, params = read(options.path, options.weights)
  for path, leaf in jax.tree.leaves_with_path(params):
    print("/".join(key.key for key in path), leaf.shape, leaf.dtype)
  network = network_of(attributes)
  labels = jnp.asarray([int(label) for label in options.labels.split(",")])
  size, channels = attributes["input_size"], attributes["channels"]
  noise = jax.random.normal(jax.random.key(options.seed), (len(labels), size, size, channels))

  @jax.jit
  def sample(params, labels, noise):
    def field(x):
      return network.apply({"params": params}, x, labels)

    return descend(field, noise, options.step_size, options.max_nfe, options.threshold)

  x, nfe = sample(params, labels, noise)
  np.savez(options.out, noise=noise, labels=labels, x=x, nfe=nfe)
  print(f"{options.out}: x {x.shape}, mean {x.mean():.4f}, deviation {x.std():.4f}, NFE {nfe.mean():.1f}")


if __name__ == "__main__":
  main()
