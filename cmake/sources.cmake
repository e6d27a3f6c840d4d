# Every C++ source file, by name. A new file is added here and nowhere else.
# (Instruction-set targets are in isa_flags.cmake's list, with the flags that each one needs.)

set(BITFOLD_CORE_SOURCES
  csrc/core/bitpack.cc
  csrc/core/codebook.cc
  csrc/core/dynamic_map.cc
  csrc/core/format.cc
  csrc/core/scale_coding.cc
  csrc/core/shrinks.cc
  csrc/core/view.cc
  csrc/core/reference/dequantize.cc
  csrc/core/reference/encode.cc
  csrc/core/reference/linear.cc
)

set(BITFOLD_CPU_SOURCES
  csrc/cpu/activations.cc
  csrc/cpu/dequantize.cc
  csrc/cpu/float_product.cc
  csrc/cpu/integer_product.cc
  csrc/cpu/isa.cc
  csrc/cpu/linear.cc
  csrc/cpu/mixed_product.cc
  csrc/cpu/outliers.cc
)

set(BITFOLD_SOLVER_SOURCES
  csrc/solvers/awq_clip.cc
  csrc/solvers/awq_grid.cc
  csrc/solvers/awq_scale.cc
  csrc/solvers/factor.cc
  csrc/solvers/feedback.cc
  csrc/solvers/gptq.cc
  csrc/solvers/group_search.cc
  csrc/solvers/hessian.cc
  csrc/solvers/hqq.cc
  csrc/solvers/importance.cc
  csrc/solvers/kmeans.cc
  csrc/solvers/options.cc
  csrc/solvers/outliers.cc
  csrc/solvers/panel_scales.cc
  csrc/solvers/panels.cc
  csrc/solvers/quantize.cc
  csrc/solvers/refit.cc
  csrc/solvers/sampled_loss.cc
  csrc/solvers/scale_search.cc
  csrc/solvers/scale_storage.cc
  csrc/solvers/sections.cc
)

# name of the target file in csrc/cpu/targets
set(BITFOLD_ISA_PORTABLE portable)
set(BITFOLD_ISA_X86 avx2 avx512 avx512vnni)

# csrc/cuda: what runs on the host is plain C++, part of the core library, and tested without a GPU.
set(BITFOLD_CUDA_HOST_SOURCES
  csrc/cuda/encode.cc
  csrc/cuda/launch.cc
  csrc/cuda/level_factor.cc
  csrc/cuda/linear_plan.cc
  csrc/cuda/plan_cache.cc
  csrc/cuda/weight.cc
)
# (quantize.cc leads through kernels: it is linked where they are.)
set(BITFOLD_CUDA_SOURCES
  csrc/cuda/quantize.cc
  csrc/cuda/copy.cu
  csrc/cuda/dequantize.cu
  csrc/cuda/feedback.cu
  csrc/cuda/hqq.cu
  csrc/cuda/linear_any.cu
  csrc/cuda/linear_mma.cu
  csrc/cuda/linear_mma_2.cu
  csrc/cuda/linear_mma_3.cu
  csrc/cuda/linear_mma_4.cu
  csrc/cuda/linear_mma_8.cu
  csrc/cuda/losses.cu
  csrc/cuda/encode.cu
  csrc/cuda/pack.cu
  csrc/cuda/refit.cu
  csrc/cuda/rounding.cu
  csrc/cuda/scales.cu
  csrc/cuda/statistics.cu
  csrc/cuda/store_scales.cu
  csrc/solvers/cuda/feedback.cc
  csrc/solvers/cuda/gptq.cc
  csrc/solvers/cuda/hessian.cc
  csrc/solvers/cuda/layer.cc
  csrc/solvers/cuda/refit.cc
  csrc/solvers/cuda/scales.cc
)
set(BITFOLD_OPS_CUDA_SOURCES
  csrc/torch/checks.cc
  csrc/torch/cuda/context.cc
  csrc/torch/cuda/dense_product.cc
  csrc/torch/cuda/dequantize.cc
  csrc/torch/cuda/linear.cc
  csrc/torch/cuda/linear_algebra.cc
  csrc/torch/cuda/pack.cc
  csrc/torch/cuda/quantize.cc
  csrc/torch/cuda/solvers.cc
  csrc/torch/dense.cc
  csrc/torch/solver_arguments.cc
)

set(BITFOLD_OPS_SOURCES
  csrc/torch/awq.cc
  csrc/torch/checks.cc
  csrc/torch/cpu_kernels.cc
  csrc/torch/dense.cc
  csrc/torch/dequantize.cc
  csrc/torch/hqq.cc
  csrc/torch/linear.cc
  csrc/torch/linear_algebra.cc
  csrc/torch/outliers.cc
  csrc/torch/pack.cc
  csrc/torch/quantize.cc
  csrc/torch/schemas.cc
  csrc/torch/solver_arguments.cc
  csrc/torch/solvers.cc
)

set(BITFOLD_PYTHON_SOURCES
  csrc/python/module.cc
)

# C++ tests mirror csrc/: core/format -> tests/cpp/core/format_test.cc. Those in PER_ISA_TESTS run once per
# instruction set that the machine has (BITFOLD_ISA).
set(BITFOLD_CPP_TESTS
  core/bitpack
  core/codebook
  core/float16
  core/format
  core/scale_coding
  core/view
  cuda/decode
  cuda/encode
  cuda/kernels
  cuda/launch
  cuda/linear_kernels
  cuda/linear_plan
  cuda/mma_maps
  cuda/mma_tile
  cpu/activations
  cpu/instruction_sets
  cpu/isa
  solvers/awq_clip
  solvers/awq_scale
  solvers/cuda/gptq
  solvers/cuda/hessian
  solvers/cuda/hqq
  solvers/gptq
  solvers/hessian
  solvers/hqq
  solvers/kmeans
  solvers/outliers
  solvers/quantize
)
set(BITFOLD_CPP_PER_ISA_TESTS
  cpu/accuracy
  cpu/decode
  cpu/dequantize
  cpu/extreme_values
  cpu/feedback
  cpu/gemm
  cpu/integer_product
  cpu/linear
  cpu/mixed_product
  cpu/outliers
  cpu/page_end
  cpu/quantize_activations
  cpu/quantize_kernels
  cpu/unit_vectors
)
