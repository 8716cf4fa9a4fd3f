"""Times eqm_jax and the authors' PyTorch code in turn, on CPUs: python docs/against_pytorch.py --help

    git clone https://github.com/raywang4/EqM reference
    python -m venv torch && torch/bin/pip install torch torchvision timm
    python docs/against_pytorch.py --reference=reference --torch-python=torch/bin/python

Each library runs in a process of its own, with its own threads, and waits while the other works. Both have the same
network (S/2 or B/4, float32, batch 8), and parameters that are not zero, so that no product is trivial. A turn is three
calls, the first of which is not timed: it takes back memory and caches that the other library had in between.

forward    one call of the network
step       corruption, loss, gradient, AdamW and the average of the weights
descent    one evaluation of the network inside a descent with NFE 4 (theirs: the loop of their sampling script)
guided     the same with guidance 1.5, which takes twice the batch
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SIZES = {"S/2": (12, 384, 6, 2), "B/4": (12, 768, 12, 4)}  # depth, width, heads, patch
CASES = ("forward", "step", "descent", "guided")
BATCH, NFE = 8, 4
STEP_SIZE, GUIDANCE = 0.003, 1.5
WARM_UP, CALLS = 1, 2  # of each turn: calls that are not timed, and calls that are
SETTLE = 1.0  # seconds before each call: threads of the library that ran before spin on after their last product


def main():
  """Prints a Markdown table of medians and ratios, or serves one library's side of it."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--reference", required=True, help="folder of the authors' code, with its models.py")
  parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has torch and timm")
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--sizes", default="S/2,B/4")
  parser.add_argument("--cases", default=",".join(CASES))
  parser.add_argument("--serve", choices=("torch", "jax"), help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.serve:
    serve(options)
    return
  print("| network, batch 8 | case | PyTorch, s | eqm_jax, s | ratio, median of turns | smallest, largest ratio |")
  print("|---|---|---|---|---|---|")
  for size in options.sizes.split(","):
    sides = {side: start(side, size, options) for side in ("torch", "jax")}
    for case in options.cases.split(","):
      times = {side: [] for side in sides}
      for turn in range(options.turns + 1):
        for side, process in sides.items():
          seconds = ask(process, case)
          if turn:  # the first compiles
            times[side].append(seconds)
      medians = {side: statistics.median(values) for side, values in times.items()}
      ratios = [ours / theirs for ours, theirs in zip(times["jax"], times["torch"])]
      print(
        f"| {size} | {case} | {medians['torch']:.3f} | {medians['jax']:.3f} | {statistics.median(ratios):.2f} "
        f"| {min(ratios):.2f}, {max(ratios):.2f} |",
        flush=True,
      )
    for process in sides.values():
      process.stdin.close()
      process.wait()


def start(side: str, size: str, options: argparse.Namespace) -> subprocess.Popen:
  """A process that answers the name of a case with the seconds it took."""
  python = sys.executable if side == "jax" else options.torch_python
  command = [python, __file__, f"--reference={options.reference}", f"--sizes={size}", f"--serve={side}"]
  return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen, case: str) -> float:
  """The seconds of one case, measured by the process."""
  time.sleep(SETTLE)
  process.stdin.write(case + "\n")
  process.stdin.flush()
  line = process.stdout.readline()
  if not line:
    raise RuntimeError(f"{' '.join(process.args)} ended while it was asked for {case!r}")
  return json.loads(line)


def serve(options: argparse.Namespace):
  """Answers on standard output, one line a question."""
  if options.serve == "jax":
    from eqm_jax import process

    process.restart_with_huge_pages()  # as eqm_jax.main does
  runs = (jax_side if options.serve == "jax" else torch_side)(options)
  for line in sys.stdin:
    case = line.strip()
    for call in range(WARM_UP + CALLS):
      if call == WARM_UP:
        begin = time.perf_counter()
      runs[case]()
    seconds = (time.perf_counter() - begin) / CALLS
    print(json.dumps(seconds / (NFE if case in ("descent", "guided") else 1)), flush=True)


def jax_side(options: argparse.Namespace) -> dict:
  """The cases of eqm_jax: its network, its training step, its sampler."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
  import runpy

  import jax
  import jax.numpy as jnp
  import numpy as np

  import eqm_jax
  from eqm_jax.networks.dit import DiT
  from eqm_jax.training import sharding, state, step

  config_file = os.path.join(sys.path[0], "configs", "imagenet256.py")
  config = runpy.run_path(config_file)["get_config"](options.sizes)
  config.model.update(dtype="float32", remat="none", learn_sigma=True)
  config.train.batch_size = BATCH
  model, mesh = DiT(**config.model), sharding.make_mesh(data=1, fsdp=1, tensor=1)
  optimizer = state.make_optimizer(config.optimizer, config.train.steps)
  rng = np.random.default_rng(0)

  def initial():
    start = state.init_state(model, optimizer, 0)
    noisy = jax.tree.map(
      lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), start.params
    )
    return start.replace(params=noisy, ema_params=jax.tree.map(jnp.copy, noisy))

  shardings = sharding.state_shardings(jax.eval_shape(initial), config.sharding, mesh)
  train = step.make_step(config, model, optimizer, mesh, shardings)
  current = [jax.jit(initial, out_shardings=shardings)()]
  params = jax.tree.map(jnp.copy, current[0].params)
  x, label = jnp.asarray(rng.normal(size=(BATCH, 32, 32, 4)), jnp.float32), jnp.arange(BATCH)
  batch = {"mean": x, "logvar": jnp.zeros_like(x) - 20, "label": label}
  forward = jax.jit(lambda params, x: model.apply({"params": params}, x, label))

  def one_step():
    current[0], scalars = train(current[0], batch, None)
    jax.block_until_ready((current[0], scalars))

  def descent(guidance):
    field = eqm_jax.field(model, params, label, guidance=guidance)
    eqm_jax.descend(field, x, step_size=STEP_SIZE, max_nfe=NFE, rule="gd").x.block_until_ready()

  return {
    "forward": lambda: forward(params, x).block_until_ready(),
    "step": one_step,
    "descent": lambda: descent(1.0),
    "guided": lambda: descent(GUIDANCE),
  }


def torch_side(options: argparse.Namespace) -> dict:
  """The cases of the authors' network, as their scripts call it."""
  sys.path.insert(0, options.reference)
  import copy

  import torch
  from models import EqM

  depth, width, heads, patch = SIZES[options.sizes]
  model = EqM(depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
  for parameter in model.parameters():
    if parameter.requires_grad:
      parameter.data.add_(0.02 * torch.randn_like(parameter))
  average = copy.deepcopy(model).eval()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
  x, label = torch.randn(BATCH, 4, 32, 32), torch.arange(BATCH)

  def one_step():
    model.train()
    gamma, noise = torch.rand(BATCH), torch.randn_like(x)
    g = gamma[:, None, None, None]
    target = (x - noise) * (4 * torch.clamp(5 * (1 - g), max=1))
    loss = ((model(g * x + (1 - g) * noise, gamma, label) - target) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
      for kept, new in zip(average.parameters(), model.parameters()):
        kept.mul_(0.9999).add_(new, alpha=1e-4)
    return loss.item()

  @torch.no_grad()
  def forward():
    return average(x.clone(), torch.zeros(BATCH), label)

  @torch.no_grad()
  def descent(guided):
    at = torch.cat([x, x]) if guided else x.clone()
    labels = torch.cat([label, torch.full_like(label, 1000)]) if guided else label
    for _ in range(NFE):
      time_input = torch.zeros(len(at))
      out = average.forward_with_cfg(at, time_input, labels, GUIDANCE) if guided else average(at, time_input, labels)
      at = at + out * STEP_SIZE

  return {
    "forward": forward,
    "step": one_step,
    "descent": lambda: descent(False),
    "guided": lambda: descent(True),
  }


if __name__ == "__main__":
  main()
