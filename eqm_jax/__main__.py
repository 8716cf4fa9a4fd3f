"""The program `eqm-jax`, which is also `python -m eqm_jax`."""

import runpy


def command():
  """Runs `eqm_jax.main` as `python -m eqm_jax.main` does: of a module that is imported, absl's --help shows nothing."""
  runpy.run_module("eqm_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  command()
