// Where the tensors of a call lie in this step. Anybody may have exchanged the memory behind them since the last one.
#pragma once

#include <atomic>
#include <cstddef>
#include <utility>
#include <vector>

#include "headers.h"
#include "passes.h"
#include "tensors.h"
#include "threads.h"

namespace largebatch {

// A weight and what belongs to it: addresses of their first elements, as looked up.
struct Place {
  at::ScalarType made_for;  // of the weight
  size_t first_size;        // of the weight, among all weights' sizes
  char *weight, *grad, *state[2];
  float* step;
  Dtype weight_dtype, grad_dtype, state_dtype;
  bool is_grad_alike;  // laid out like the weight
};

class Lookup {
 public:
  Lookup(std::vector<at::Tensor> weights, const std::vector<std::vector<at::Tensor>>& states,
         std::vector<at::Tensor> steps)
      : weights_(std::move(weights)), num_states_(states.empty() ? 0 : states[0].size()), steps_(std::move(steps)) {
    for (const auto& state : states) states_.insert(states_.end(), state.begin(), state.end());
    for (const auto& weight : weights_) {
      places_.push_back({.made_for = weight.scalar_type(), .first_size = sizes_.size()});
      sizes_.insert(sizes_.end(), weight.sizes().begin(), weight.sizes().end());
    }
  }

  // Looks everything up, in one go through all headers: they are in memory, not in the caches. False if the weights have
  // another device, dtype or shape than at first.
  bool renew(const py::object& grads) {
    GivenGradients given{tensors_in(grads)};
    TORCH_CHECK(given.tensors.size() == weights_.size(), "expected ", weights_.size(), " gradients, got ",
                given.tensors.size());
    return renew_with(given);
  }

  // The same with the gradients that the weights have themselves, which are found on the way and put into the list. False
  // also if a weight has none.
  bool find_gradients(std::vector<at::Tensor>& grads) {
    grads.resize(weights_.size());
    FoundGradients found{weights_, grads};
    return renew_with(found);
  }

  // Whether weights and states lie densely in memory and alike, so that they can be taken as flat arrays.
  bool is_flat() const { return is_flat_; }
  bool counts_steps() const { return !steps_.empty(); }
  const std::vector<Place>& places() const { return places_; }

  // Puts copies in the place of the gradients that are not laid out like their weights, and returns them. No copy shall
  // outlive the call, so that nobody's memory is kept; they are made and let go while the GIL is held.
  std::vector<at::Tensor> lay_out(const py::object& grads) {
    std::vector<at::Tensor> copies;
    if (are_grads_alike_) return copies;
    const std::vector<const at::Tensor*> gradients = tensors_in(grads);
    for (size_t i = 0; i < places_.size(); ++i) {
      if (places_[i].is_grad_alike) continue;
      copies.push_back(laid_out_like(*gradients[i], weights_[i]));
      places_[i].grad = static_cast<char*>(copies.back().data_ptr());
    }
    return copies;
  }

  // Adds one to the step counts.
  void count() {
    if (!counts_steps()) return;
    in_parallel_ranges(places_.size(), [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) {
        if (i + 2 * headers_ahead < end) __builtin_prefetch(places_[i + 2 * headers_ahead].step, 1);
        *places_[i].step += 1.0f;
      }
    });
  }

 private:
  // Where gradients come from: at(i) may be asked for when ask(i) has been called some tensors before, take(i) once for each.
  struct GivenGradients {
    std::vector<const at::Tensor*> tensors;

    void ask(size_t) const {}
    const at::Tensor& at(size_t i) const { return *tensors[i]; }
    void take(size_t) const {}
  };
  struct FoundGradients {
    const std::vector<at::Tensor>& weights;
    std::vector<at::Tensor>& grads;

    LARGEBATCH_INLINE void ask(size_t i) const { prefetch_autograd(weights[i]); }
    const at::Tensor& at(size_t i) const { return weights[i].unsafeGetTensorImpl()->grad(); }
    void take(size_t i) const { grads[i] = at(i); }
  };

  template <class Gradients>
  bool renew_with(Gradients& gradients) {
    std::atomic<bool> is_current{true}, is_flat{true}, are_grads_alike{true};
    in_parallel_ranges(places_.size(), [&](size_t begin, size_t end) {
      const auto first = static_cast<ptrdiff_t>(begin), last = static_cast<ptrdiff_t>(end);
      constexpr auto ahead = static_cast<ptrdiff_t>(headers_ahead);
      // each of these is found through the one before
      for (ptrdiff_t i = first - 4 * ahead; i < last; ++i) {
        auto is_there = [&](ptrdiff_t j) { return first <= j && j < last; };
        if (const ptrdiff_t j = i + 4 * ahead; is_there(j)) prefetch_headers(j);
        if (const ptrdiff_t j = i + 3 * ahead; is_there(j)) prefetch_storages(j), gradients.ask(j);
        if (const ptrdiff_t j = i + 2 * ahead; is_there(j)) prefetch_header(gradients.at(j));
        if (const ptrdiff_t j = i + ahead; is_there(j)) prefetch_storage(gradients.at(j));
        if (!is_there(i)) continue;
        Place& place = places_[i];
        const at::Tensor &weight = weights_[i], &grad = gradients.at(i);
        if (!grad.defined() || !weight.is_cpu() || weight.scalar_type() != place.made_for || weight.sizes() != sizes(i)) {
          is_current = false;
          continue;
        }
        gradients.take(i);
        if (!weight.is_non_overlapping_and_dense()) is_flat = false;
        place.weight = static_cast<char*>(weight.data_ptr());
        place.weight_dtype = dtype_of(weight);
        for (size_t s = 0; s < num_states_; ++s) {
          const at::Tensor& state = states_[i * num_states_ + s];
          if (!are_laid_out_alike(state, weight)) is_flat = false;
          place.state[s] = static_cast<char*>(state.data_ptr());
          place.state_dtype = dtype_of(state);
        }
        place.grad = static_cast<char*>(grad.data_ptr());
        place.grad_dtype = dtype_of(grad);
        place.is_grad_alike = are_laid_out_alike(grad, weight);
        if (!place.is_grad_alike) are_grads_alike = false;
        if (counts_steps()) __builtin_prefetch(place.step = steps_[i].data_ptr<float>());
        check_dtypes(place, &states_[i * num_states_]);
      }
    });
    is_flat_ = is_flat, are_grads_alike_ = are_grads_alike;
    return is_current;
  }

  // Of a weight, as it was at first.
  c10::IntArrayRef sizes(size_t i) const {
    const size_t first = places_[i].first_size, end = i + 1 < places_.size() ? places_[i + 1].first_size : sizes_.size();
    return {sizes_.data() + first, end - first};
  }

  void check_dtypes(const Place& place, const at::Tensor* states) const {
    const bool is_fp64 = place.weight_dtype == Dtype::fp64;
    bool is_good = (place.grad_dtype == Dtype::fp64) == is_fp64;
    for (size_t s = 0; s < num_states_; ++s) is_good &= (dtype_of(states[s]) == Dtype::fp64) == is_fp64;
    TORCH_CHECK(is_good, "fp64 weights go with fp64 gradients and state, all others with fp32, bf16 or fp16 ones");
    for (size_t s = 0; s < num_states_; ++s)
      TORCH_CHECK(dtype_of(states[s]) == place.state_dtype, "state of ", states[s].scalar_type(), " and of ",
                  states[num_states_ - 1].scalar_type(),
                  " for the same weight; all tensors of a weight's state have one type");
  }

  LARGEBATCH_INLINE void prefetch_headers(size_t i) const {
    prefetch_header(weights_[i]);
    for (size_t s = 0; s < num_states_; ++s) prefetch_header(states_[i * num_states_ + s]);
    if (counts_steps()) prefetch_header(steps_[i]);
  }

  // When the tensors' own headers are there.
  LARGEBATCH_INLINE void prefetch_storages(size_t i) const {
    prefetch_storage(weights_[i]);
    for (size_t s = 0; s < num_states_; ++s) prefetch_storage(states_[i * num_states_ + s]);
    if (counts_steps()) prefetch_storage(steps_[i]);
  }

  std::vector<at::Tensor> weights_;
  std::vector<int64_t> sizes_;     // of all weights, one after the other
  size_t num_states_;              // of each weight
  std::vector<at::Tensor> states_;  // of all weights, one after the other
  std::vector<at::Tensor> steps_;
  std::vector<Place> places_;
  bool is_flat_ = false, are_grads_alike_ = false;
};

}  // namespace largebatch
