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

// Whether memory does not hold the values: of a lazily negated view, or of a tensor of zeros without memory.
inline bool is_lazy(const at::Tensor& t) { return t.is_neg() || t._is_zerotensor(); }

// Whether equal indices lie at equal offsets. The stride of a dimension of size 1 says nothing about that.
inline bool are_laid_out_alike(const at::Tensor& a, const at::Tensor& b) {
  if (is_lazy(a)) return false;
  if (a.sizes() != b.sizes()) return false;
  if (a.strides() == b.strides()) return true;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// The same values in the layout of another tensor; the tensor itself if it has that layout already.
inline at::Tensor laid_out_like(const at::Tensor& values, const at::Tensor& model) {
  if (are_laid_out_alike(values, model)) return values;
  TORCH_CHECK_VALUE(values.sizes() == model.sizes(), "a gradient of shape ", values.sizes(), " for a weight of shape ",
                    model.sizes());
  return at::empty_strided(model.sizes(), model.strides(), values.options()).copy_(values);
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::fp64 ? 8 : dtype == Dtype::fp32 ? 4 : 2; }

// Tensors without Python objects, which would have to be made, counted and let go in every step.
struct TensorList {
  std::vector<at::Tensor> tensors;

  TensorList() = default;
  TensorList(TensorList&&) = default;
  ~TensorList() {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (i + headers_ahead < tensors.size()) prefetch_header(tensors[i + headers_ahead]);
      tensors[i].reset();
    }
  }
};

// The tensors in a TensorList or a Python list, which has to outlive what is returned.
inline std::vector<const at::Tensor*> tensors_in(const py::object& list) {
  std::vector<const at::Tensor*> tensors;
  if (py::isinstance<TensorList>(list)) {
    for (const at::Tensor& tensor : list.cast<const TensorList&>().tensors) tensors.push_back(&tensor);
    return tensors;
  }
  for (py::handle item : py::cast<py::list>(list)) {
    TORCH_CHECK_TYPE(THPVariable_Check(item.ptr()), "expected a list of tensors");
    tensors.push_back(&THPVariable_Unpack(item.ptr()));
  }
  return tensors;
}

}  // namespace largebatch
