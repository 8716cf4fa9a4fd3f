# shellcheck shell=bash
# Sourced before a run on NVIDIA GPUs, as launch/slurm.sbatch does:
#
#   source launch/gpu_env.sh && python -m eqm_jax.main --config=configs/imagenet256.py:XL/2-gpu --workdir=runs/xl2
#
# What is set already stays: of XLA_FLAGS, whose later ones count, those of the caller come last. docs/gpus.md explains.

# Collectives beside arithmetic: the compiler hides them, lets those of one block run beside the next, and joins those
# of one block (XL/2 has 32 MB of weights in one, in bfloat16).
xla_flags=(
  --xla_gpu_enable_latency_hiding_scheduler=true
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  --xla_gpu_enable_while_loop_double_buffering=true
  --xla_gpu_all_gather_combine_threshold_bytes=268435456
  --xla_gpu_reduce_scatter_combine_threshold_bytes=268435456
  --xla_gpu_all_reduce_combine_threshold_bytes=268435456
)
export XLA_FLAGS="${xla_flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
# Fraction of a GPU's memory that JAX takes (its default is 0.75); the rest is for NCCL, cuDNN and CUDA itself.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/eqm_jax}
