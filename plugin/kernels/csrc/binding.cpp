// The CPU kernels as a Python module.

#include <torch/extension.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "passes.h"
#include "plan.h"
#include "tensors.h"
#include "threads.h"

namespace largebatch {

namespace {

std::vector<const Passes*> available_passes() {
  std::vector<const Passes*> available;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool has_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (passes_avx512() && has_fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    available.push_back(passes_avx512());
  if (passes_avx2() && has_fma) available.push_back(passes_avx2());
#endif
  available.push_back(passes_portable());
  return available;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Passes* passes : available_passes()) names.push_back(passes->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const Passes* passes : available_passes()) {
    if (name == passes->name) {
      passes_in_use() = passes;
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "instruction set ", name, " is not available on this processor");
}

at::Tensor square_sums(const std::vector<at::Tensor>& tensors) {
  struct Piece {
    const void* values;
    Dtype dtype;
    int64_t begin, end;
    size_t tensor;
  };
  at::Tensor sums = at::zeros({static_cast<int64_t>(tensors.size())}, at::kDouble);
  std::vector<at::Tensor> kept;
  std::vector<Piece> pieces;
  int64_t numel = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    kept.push_back(tensors[i].is_non_overlapping_and_dense() ? tensors[i] : tensors[i].contiguous());
    for (int64_t begin = 0; begin < kept[i].numel(); begin += chunk_numel)
      pieces.push_back(
          {kept[i].data_ptr(), dtype_of(kept[i]), begin, std::min(begin + chunk_numel, kept[i].numel()), i});
    numel += kept[i].numel();
  }
  std::vector<double> parts(pieces.size());
  py::gil_scoped_release release;
  in_parallel(num_threads_for(numel), [&](int thread, int team) {
    const size_t begin = pieces.size() * thread / team, end = pieces.size() * (thread + 1) / team;
    for (size_t p = begin; p < end; ++p) {
      const auto& [values, dtype, first, last, tensor] = pieces[p];
      parts[p] = passes_in_use()->square_sum(values, dtype, dtype == Dtype::fp64, 1.0, first, last);
    }
  });
  double* out = sums.data_ptr<double>();
  for (size_t p = 0; p < pieces.size(); ++p) out[pieces[p].tensor] += parts[p];
  return sums;
}

}  // namespace

const Passes*& passes_in_use() {
  static const Passes* passes = available_passes().front();
  return passes;
}

}  // namespace largebatch

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace largebatch;
  py::class_<Plan>(module, "Plan")
      .def(py::init<std::vector<at::Tensor>, std::vector<std::vector<at::Tensor>>, std::vector<at::Tensor>,
                    std::vector<std::array<int64_t, 5>>, const std::vector<double>&, const std::vector<double>&,
                    const std::vector<bool>&, const std::vector<uint32_t>&, const std::string&, const py::dict&, bool>())
      .def("look_up", &Plan::look_up)
      .def("count", &Plan::count)
      .def("is_flat", &Plan::is_flat)
      .def("sums_before", &Plan::sums_before)
      .def("accumulate", &Plan::accumulate)
      .def("advance", &Plan::advance)
      .def("step", &Plan::step);
  module.def("square_sums", &square_sums);
  module.def("instruction_sets", &instruction_sets);
  module.def("use_instruction_set", &use_instruction_set);
  module.def("instruction_set", [] { return std::string(passes_in_use()->name); });
}
