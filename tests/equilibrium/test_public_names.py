"""The public names, as editors and type checkers see them and as they are at run time."""

import ast
import pathlib

import pytest

import eqm_jax

PACKAGE = pathlib.Path(eqm_jax.__file__).parent


def test_type_checkers_see_the_names_of_run_time():
  tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
  imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("eqm_jax.")]
  seen = {alias.name: node.module for node in imports for alias in node.names}
  assert all(alias.name == alias.asname for node in imports for alias in node.names)  # a re-export
  assert seen == {name: f"eqm_jax.{home}" for name, home in eqm_jax._HOMES.items()}
  assert sorted(eqm_jax.__all__) == sorted(seen)
  assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("name", ["implicit_field", "conditional_field", "energy_field", "CONVERGED"])
def test_old_names_are_gone(name):
  assert not hasattr(eqm_jax, name)


def test_a_status_has_a_name():
  assert eqm_jax.Status(0) is eqm_jax.Status.CONVERGED and eqm_jax.Status.DIVERGED == 2
