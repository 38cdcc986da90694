// Tensors as the kernels see them: types, places in memory, and the gradients of one call.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/extension.h>

#include <atomic>
#include <vector>

#include "headers.h"
#include "passes.h"
#include "threads.h"

namespace largebatch {

namespace py = pybind11;

inline Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Dtype::fp64;
    case at::kFloat: return Dtype::fp32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::fp16;
    default: TORCH_CHECK_TYPE(false, "the CPU kernels know fp64, fp32, bf16 and fp16, not ", tensor.scalar_type());
  }
}

inline bool are_laid_out_alike(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides();
}

// The same values in the layout of another tensor; the tensor itself if it has that layout already.
inline at::Tensor laid_out_like(const at::Tensor& values, const at::Tensor& model) {
  if (are_laid_out_alike(values, model)) return values;
  TORCH_CHECK_VALUE(values.sizes() == model.sizes(), "a gradient of shape ", values.sizes(), " for a weight of shape ",
                    model.sizes());
  return at::empty_strided(model.sizes(), model.strides(), values.options()).copy_(values);
}

inline char* at_element(const at::Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.data_ptr()) + element * static_cast<int64_t>(tensor.element_size());
}

// The tensors in a list, which has to outlive what is returned.
inline std::vector<const at::Tensor*> tensors_in(const py::list& list) {
  PyObject** const items = PySequence_Fast_ITEMS(list.ptr());
  std::vector<const at::Tensor*> tensors(list.size());
  // whether another type is one of tensors is for Python to say, which other threads may not ask
  auto plain_tensor = [&](size_t i) {
    return THPVariable_CheckExact(items[i]) ? &THPVariable_Unpack(items[i]) : nullptr;
  };
  in_parallel_ranges(tensors.size(), [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      if (i + 2 * headers_ahead < end) prefetch_bytes(items[i + 2 * headers_ahead], 64);
      if (i + headers_ahead < end)
        if (const at::Tensor* tensor = plain_tensor(i + headers_ahead)) prefetch_header(*tensor);
      tensors[i] = plain_tensor(i);
      if (tensors[i]) prefetch_storage(*tensors[i]);
    }
  });
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i]) continue;
    TORCH_CHECK_TYPE(THPVariable_Check(items[i]), "expected a list of tensors");
    tensors[i] = &THPVariable_Unpack(items[i]);
  }
  return tensors;
}

// The gradients of one call: those in a list, which outlives the call, or copies in the weights' layout. No copy
// outlives it, so that nobody's memory is kept; made before the GIL is released, and gone after it is held again.
class Gradients {
 public:
  Gradients(const py::list& list, const std::vector<at::Tensor>& weights)
      : given_(tensors_in(list)), copies_(list.size()) {
    TORCH_CHECK(given_.size() == weights.size(), "expected ", weights.size(), " gradients, got ", given_.size());
    std::atomic<bool> are_alike{true};
    in_parallel_ranges(given_.size(), [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i)
        if (!are_laid_out_alike(*given_[i], weights[i])) are_alike = false;
    });
    for (size_t i = 0; i < given_.size() && !are_alike; ++i)
      if (!are_laid_out_alike(*given_[i], weights[i])) copies_[i] = laid_out_like(*given_[i], weights[i]);
  }

  const at::Tensor& operator[](size_t i) const { return is_copy(i) ? copies_[i] : *given_[i]; }
  bool is_copy(size_t i) const { return copies_[i].defined(); }

 private:
  std::vector<const at::Tensor*> given_;
  std::vector<at::Tensor> copies_;
};

}  // namespace largebatch
