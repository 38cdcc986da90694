// Tensors as the kernels see them: types, and where the tensors of a call lie in this step. Anybody may have exchanged the memory
// behind them since the last one.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/extension.h>

#include <utility>
#include <vector>

#include "plan.h"

namespace largebatch {

namespace py = pybind11;

inline Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Dtype::fp64;
    case at::kFloat: return Dtype::fp32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::fp16;
    default:
      TORCH_CHECK_TYPE(false, "the CPU kernels know fp64, fp32, bf16 and fp16, not ",
                       tensor.scalar_type());
  }
}

// Whether memory does not hold the values: of a lazily negated view, or of a tensor of zeros without memory.
inline bool is_lazy(const at::Tensor& t) { return t.is_neg() || t._is_zerotensor(); }

// Whether equal indices lie at equal offsets. The stride of a dimension of size 1 says nothing about that.
inline bool are_laid_out_alike(const at::Tensor& a, const at::Tensor& b) {
  if (is_lazy(a) || a.sizes() != b.sizes()) return false;
  if (a.strides() == b.strides()) return true;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// The same values in the layout of another tensor.
inline at::Tensor laid_out_like(const at::Tensor& values, const at::Tensor& model) {
  TORCH_CHECK_VALUE(values.sizes() == model.sizes(), "a gradient of shape ", values.sizes(),
                    " for a weight of shape ", model.sizes());
  return at::empty_strided(model.sizes(), model.strides(), values.options()).copy_(values);
}

class Lookup {
 public:
  Lookup(std::vector<at::Tensor> weights, std::vector<std::vector<at::Tensor>> states,
         std::vector<at::Tensor> steps, bool may_overwrite_grads)
      : weights_(std::move(weights)), states_(std::move(states)), steps_(std::move(steps)),
        may_overwrite_grads_(may_overwrite_grads), places_(weights_.size()) {
    for (const auto& weight : weights_)
      layouts_.emplace_back(weight.scalar_type(), weight.sizes().vec());
  }

  // False if the weights have another device, dtype or shape than at first.
  bool renew(const py::list& grads) {
    TORCH_CHECK(grads.size() == weights_.size(), "expected ", weights_.size(), " gradients, got ",
                grads.size());
    bool is_current = true;
    is_flat_ = true;
    for (size_t i = 0; i < weights_.size(); ++i) {
      Place& place = places_[i];
      const at::Tensor &weight = weights_[i], &grad = tensor_in(grads[i]);
      if (!weight.is_cpu() || weight.scalar_type() != layouts_[i].first ||
          weight.sizes() != layouts_[i].second) {
        is_current = false;
        continue;
      }
      if (!weight.is_non_overlapping_and_dense()) is_flat_ = false;
      place.weight = static_cast<char*>(weight.data_ptr());
      place.weight_dtype = dtype_of(weight);
      for (size_t s = 0; s < states_[i].size(); ++s) {
        const at::Tensor& state = states_[i][s];
        if (!are_laid_out_alike(state, weight)) is_flat_ = false;
        place.state[s] = static_cast<char*>(state.data_ptr());
        place.state_dtype = dtype_of(state);
      }
      place.grad = static_cast<char*>(grad.data_ptr());
      place.grad_dtype = dtype_of(grad);
      // a copy of the gradient would not be there in the second pass of a step in two calls
      place.may_overwrite_grad = may_overwrite_grads_ && are_laid_out_alike(grad, weight);
      if (!steps_.empty()) place.step = steps_[i].data_ptr<float>();
      check_dtypes(place, states_[i]);
    }
    return is_current;
  }

  // Whether weights and states lie densely in memory and alike, so that they can be taken as flat arrays.
  bool is_flat() const { return is_flat_; }
  const std::vector<Place>& places() const { return places_; }

  // Puts copies in the place of the gradients that are not laid out like their weights, and returns them. No copy shall
  // outlive the call, so that nobody's memory is kept; they are made and let go while the GIL is held.
  std::vector<at::Tensor> lay_out(const py::list& grads) {
    std::vector<at::Tensor> copies;
    for (size_t i = 0; i < places_.size(); ++i) {
      const at::Tensor& grad = tensor_in(grads[i]);
      if (are_laid_out_alike(grad, weights_[i])) continue;
      copies.push_back(laid_out_like(grad, weights_[i]));
      places_[i].grad = static_cast<char*>(copies.back().data_ptr());
    }
    return copies;
  }

  // Adds one to the step counts.
  void count() {
    for (const at::Tensor& step : steps_) *step.data_ptr<float>() += 1.0f;
  }

 private:
  static const at::Tensor& tensor_in(py::handle item) {
    TORCH_CHECK_TYPE(THPVariable_Check(item.ptr()), "expected a list of tensors");
    return THPVariable_Unpack(item.ptr());
  }

  static void check_dtypes(const Place& place, const std::vector<at::Tensor>& states) {
    const bool is_fp64 = place.weight_dtype == Dtype::fp64;
    bool is_good = (place.grad_dtype == Dtype::fp64) == is_fp64;
    for (const auto& state : states) is_good &= (dtype_of(state) == Dtype::fp64) == is_fp64;
    TORCH_CHECK(
        is_good,
        "fp64 weights go with fp64 gradients and state, all others with fp32, bf16 or fp16 ones");
    for (const auto& state : states)
      TORCH_CHECK(dtype_of(state) == place.state_dtype, "state of ", state.scalar_type(),
                  " and of ", states.back().scalar_type(),
                  " for the same weight; all tensors of a weight's state have one type");
  }

  std::vector<at::Tensor> weights_;
  std::vector<std::vector<at::Tensor>> states_;  // of each weight
  std::vector<at::Tensor> steps_;
  bool may_overwrite_grads_;
  std::vector<std::pair<at::ScalarType, std::vector<int64_t>>>
      layouts_;  // of the weights, at first
  std::vector<Place> places_;
  bool is_flat_ = false;
};

}  // namespace largebatch
