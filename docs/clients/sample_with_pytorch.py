"""Samples from an export of eqm_jax with PyTorch and the authors' own network; needs nothing of eqm_jax or JAX.

    git clone https://github.com/raywang4/EqM reference
    python -m venv torch && torch/bin/pip install torch torchvision timm safetensors
    torch/bin/python docs/clients/sample_with_pytorch.py --reference=reference --checkpoint=exported.pt --labels=0,1,2

`--checkpoint` is a file of `eqm_jax.export_reference`, .pt or .safetensors. The result, a .pt file of `noise`, `labels`
and `x` [N, C, H, W], holds images in [-1, 1], or latents for the autoencoder that the model was trained with.
"""

import argparse
import json
import sys

import torch

# What the network is built with.
ARGUMENTS = (
  "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes",
  "learn_sigma", "uncond", "ebm",
)  # fmt: skip


def load(path: str) -> tuple[dict, dict]:
  """The arguments of the network, and its state dict."""
  if path.endswith(".safetensors"):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
      return json.loads(file.metadata()["args"]), {name: file.get_tensor(name) for name in file.keys()}
  with torch.serialization.safe_globals([argparse.Namespace]):
    contents = torch.load(path, map_location="cpu", weights_only=True)
  return vars(contents["args"]), contents["ema"]


def descend(model, x, labels, options: argparse.Namespace):
  """Gradient descent, with Nesterov's look ahead if there is a momentum: the network's output points downhill."""
  time = torch.zeros(len(x), device=x.device)
  velocity = torch.zeros_like(x)
  for _ in range(options.steps):
    ahead = x + options.step_size * options.momentum * velocity
    if options.guidance != 1:  # on the first three channels, as in the authors' scripts
      null = torch.full_like(labels, model.y_embedder.num_classes)
      both = torch.cat([labels, null])
      output = model.forward_with_cfg(torch.cat([ahead, ahead]), torch.cat([time, time]), both, options.guidance)
      velocity = output[: len(x)].detach()
    else:
      velocity = model(ahead, time, labels).detach()
    x = x + options.step_size * velocity
  return x


def main():
  """Reads the export, descends from noise and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--reference", required=True, help="folder of the authors' code, with its models.py")
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--labels", default="0", help="one for each sample, with commas between")
  parser.add_argument("--steps", type=int, default=249, help="NFE")
  parser.add_argument("--step-size", type=float, default=0.003)
  parser.add_argument("--momentum", type=float, default=0.0)
  parser.add_argument("--guidance", type=float, default=1.0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
  parser.add_argument("--out", default="samples.pt")
  options = parser.parse_args()

  sys.path.insert(0, options.reference)
  from models import EqM

  arguments, state = load(options.checkpoint)
  model = EqM(**{name: arguments[name] for name in ARGUMENTS}).to(options.device).eval()
  model.load_state_dict(state)
  model.requires_grad_(False)
  labels = torch.tensor([int(label) for label in options.labels.split(",")], device=options.device)
  shape = (len(labels), model.in_channels, arguments["input_size"], arguments["input_size"])
  noise = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed)).to(options.device)
  x = descend(model, noise, labels, options)
  torch.save({"noise": noise.cpu(), "labels": labels.cpu(), "x": x.cpu()}, options.out)
  print(f"{options.out}: x {tuple(x.shape)}, mean {x.mean():.4f}, deviation {x.std():.4f}")


if __name__ == "__main__":
  main()
