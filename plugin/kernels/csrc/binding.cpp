// The CPU kernels as a Python module.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "instruction_sets.h"
#include "options.h"
#include "passes.h"
#include "plan.h"
#include "tensors.h"
#include "threads.h"

namespace largebatch {

namespace {

int num_threads_for(int64_t numel) {
  // below this a second thread costs more than it gains
  return numel < 32768 ? 1 : at::get_num_threads();
}

// A plan and its tensors. All results are fp64 tensors.
class TensorPlan {
 public:
  TensorPlan(std::vector<at::Tensor> weights, std::vector<std::vector<at::Tensor>> states,
             std::vector<at::Tensor> steps, const std::vector<std::array<int64_t, 5>>& spans,
             const std::vector<double>& weight_decays,
             const std::vector<double>& decoupled_weight_decays,
             const std::vector<bool>& are_adapted, const std::vector<uint32_t>& seeds,
             const std::string& rule, const py::dict& options, bool may_overwrite_grads)
      : lookup_(std::move(weights), std::move(states), std::move(steps), may_overwrite_grads),
        plan_(spans_of(spans),
              treatments_of(weight_decays, decoupled_weight_decays, are_adapted, seeds),
              rule_of(rule, options)),
        numel_(plan_.total_numel()) {}

  // See Lookup.
  bool look_up(const py::list& grads) { return lookup_.renew(grads); }
  bool is_flat() const { return lookup_.is_flat(); }
  void count() { lookup_.count(); }

  // [num_layers, 1]: sums of the squares of the gradients.
  at::Tensor sums_before(const py::list& grads, double grad_scale) {
    const std::vector<at::Tensor> copies = take(grads, grad_scale);
    at::Tensor sums = at::zeros({plan_.num_layers(), 1}, at::kDouble);
    py::gil_scoped_release release;
    plan_.sums_before(sums.data_ptr<double>(), num_threads());
    return sums;
  }

  // [num_layers, num_sums]: of the squares of weights and directions.
  // grad_norms: [num_layers] of whole layers, and whether their sums were finite; null for rules that do not ask.
  at::Tensor accumulate(const py::list& grads, double grad_scale,
                        const std::optional<at::Tensor>& grad_norms,
                        const std::optional<at::Tensor>& are_finite) {
    const std::vector<at::Tensor> copies = take(grads, grad_scale, grad_norms, are_finite);
    at::Tensor sums = at::zeros({plan_.num_layers(), plan_.num_sums()}, at::kDouble);
    py::gil_scoped_release release;
    plan_.accumulate(sums.data_ptr<double>(), num_threads());
    return sums;
  }

  // ratios: [num_layers, num_sums - 1].
  void advance(const py::list& grads, double grad_scale, double lr, const at::Tensor& ratios,
               const at::Tensor& weight_decays, const std::optional<at::Tensor>& shrinkage,
               const at::Tensor& is_finite, const std::optional<at::Tensor>& grad_norms,
               const std::optional<at::Tensor>& are_finite) {
    const std::vector<at::Tensor> copies = take(grads, grad_scale, grad_norms, are_finite);
    const at::Tensor ratios64 = ratios.to(at::kDouble).contiguous();
    const double* shrink = shrinkage ? shrinkage->data_ptr<double>() : nullptr;
    py::gil_scoped_release release;
    plan_.advance(lr, ratios64.data_ptr<double>(), weight_decays.data_ptr<double>(), shrink,
                  is_finite.data_ptr<bool>(), num_threads());
  }

  // A whole step. Returns [num_figures, num_layers], the rows of largebatch.telemetry.LayerStats; [num_layers] bool, whether the
  // layer moved; and whether all have.
  std::tuple<at::Tensor, at::Tensor, bool> step(const py::list& grads, double grad_scale,
                                                double lr) {
    const std::vector<at::Tensor> copies = take(grads, grad_scale);
    at::Tensor figures = at::zeros({plan_.num_layers(), plan_.num_figures()}, at::kDouble);
    at::Tensor moved = at::empty({plan_.num_layers()}, at::kBool);
    bool* good = moved.data_ptr<bool>();
    py::gil_scoped_release release;
    plan_.step(lr, figures.data_ptr<double>(), good, num_threads());
    return {figures.t(), moved,
            std::all_of(good, good + plan_.num_layers(), [](bool is) { return is; })};
  }

 private:
  int num_threads() const { return num_threads_for(numel_); }

  // Returns what has to live as long as the call.
  std::vector<at::Tensor> take(const py::list& grads, double grad_scale,
                               const std::optional<at::Tensor>& grad_norms = {},
                               const std::optional<at::Tensor>& are_finite = {}) {
    std::vector<at::Tensor> copies = lookup_.lay_out(grads);
    plan_.take(lookup_.places(), grad_scale);
    if (grad_norms)
      plan_.take_norms(grad_norms->to(at::kDouble).contiguous().data_ptr<double>(),
                       are_finite->data_ptr<bool>());
    return copies;
  }

  static std::vector<Span> spans_of(const std::vector<std::array<int64_t, 5>>& spans) {
    std::vector<Span> result;
    for (const auto& [tensor, start, numel, row, layer_start] : spans)
      result.push_back({tensor, start, numel, row, layer_start});
    return result;
  }

  static std::vector<Treatment> treatments_of(const std::vector<double>& weight_decays,
                                              const std::vector<double>& decoupled_weight_decays,
                                              const std::vector<bool>& are_adapted,
                                              const std::vector<uint32_t>& seeds) {
    std::vector<Treatment> result;
    for (size_t row = 0; row < weight_decays.size(); ++row)
      result.push_back(
          {weight_decays[row], decoupled_weight_decays[row], seeds[row], are_adapted[row]});
    return result;
  }

  Lookup lookup_;
  Plan plan_;
  int64_t numel_;
};

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
    kept.push_back(tensors[i].is_non_overlapping_and_dense() ? tensors[i]
                                                             : tensors[i].contiguous());
    for (int64_t begin = 0; begin < kept[i].numel(); begin += chunk_numel)
      pieces.push_back({kept[i].data_ptr(), dtype_of(kept[i]), begin,
                        std::min(begin + chunk_numel, kept[i].numel()), i});
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

}  // namespace largebatch

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace largebatch;
  py::class_<TensorPlan>(module, "Plan")
      .def(
          py::init<std::vector<at::Tensor>, std::vector<std::vector<at::Tensor>>,
                   std::vector<at::Tensor>, const std::vector<std::array<int64_t, 5>>&,
                   const std::vector<double>&, const std::vector<double>&, const std::vector<bool>&,
                   const std::vector<uint32_t>&, const std::string&, const py::dict&, bool>())
      .def("look_up", &TensorPlan::look_up)
      .def("count", &TensorPlan::count)
      .def("is_flat", &TensorPlan::is_flat)
      .def("sums_before", &TensorPlan::sums_before)
      .def("accumulate", &TensorPlan::accumulate)
      .def("advance", &TensorPlan::advance)
      .def("step", &TensorPlan::step);
  module.def("square_sums", &square_sums);
  module.def("instruction_sets", &instruction_sets);
  module.def("use_instruction_set", &use_instruction_set);
  module.def("instruction_set", [] { return std::string(passes_in_use()->name); });
}
