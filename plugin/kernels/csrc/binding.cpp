// The CPU kernels as a Python module.

#include <torch/extension.h>

#include <array>
#include <string>
#include <vector>

#include "instruction_sets.h"
#include "objects.h"
#include "plan.h"
#include "tensors.h"
#include "threads.h"

namespace largebatch {

at::Tensor square_sums(const std::vector<at::Tensor>& tensors) {
  struct Piece {
    const void* values;
    Dtype dtype;
    int64_t begin, end;
    int tensor;
  };
  at::Tensor sums = at::zeros({static_cast<int64_t>(tensors.size())}, at::kDouble);
  std::vector<at::Tensor> kept;
  std::vector<Piece> pieces;
  int64_t numel = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    kept.push_back(tensors[i].is_non_overlapping_and_dense() ? tensors[i] : tensors[i].contiguous());
    for (int64_t begin = 0; begin < kept[i].numel(); begin += chunk_numel)
      pieces.push_back({kept[i].data_ptr(), dtype_of(kept[i]), begin, std::min(begin + chunk_numel, kept[i].numel()),
                        static_cast<int>(i)});
    numel += kept[i].numel();
  }
  std::vector<double> parts(pieces.size());
  py::gil_scoped_release release;
  in_parallel(num_threads_for(numel), [&](int thread, int team) {
    const size_t begin = pieces.size() * thread / team, end = pieces.size() * (thread + 1) / team;
    for (size_t p = begin; p < end; ++p)
      parts[p] = passes_in_use()->square_sum(pieces[p].values, pieces[p].dtype, pieces[p].dtype == Dtype::fp64, 1.0, pieces[p].begin, pieces[p].end);
  });
  double* out = sums.data_ptr<double>();
  for (size_t p = 0; p < pieces.size(); ++p) out[pieces[p].tensor] += parts[p];
  return sums;
}

}  // namespace largebatch

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace largebatch;
  py::class_<Plan>(module, "Plan")
      .def(py::init<std::vector<at::Tensor>, std::vector<std::vector<at::Tensor>>, std::vector<at::Tensor>,
                    const std::vector<std::array<int64_t, 5>>&, std::vector<double>, std::vector<double>,
                    std::vector<bool>, std::vector<uint32_t>, const std::string&, const py::dict&, bool>())
      .def("look_up", &Plan::look_up)
      .def("find_gradients", &Plan::find_gradients)
      .def("count", &Plan::count)
      .def("is_flat", &Plan::is_flat)
      .def("sums_before", &Plan::sums_before)
      .def("accumulate", &Plan::accumulate)
      .def("advance", &Plan::advance)
      .def("step", &Plan::step);
  module.def("square_sums", &square_sums);
  bind_objects(module);
  module.def("instruction_sets", &instruction_sets);
  module.def("use_instruction_set", &use_instruction_set);
}
