// Tensors' headers: what a tensor is, apart from its elements.
//
// A step moves more memory than the caches hold, so the next one finds every header in memory again, and each costs
// some hundred nanoseconds of waiting if it is only asked for when it is needed.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <vector>

namespace largebatch {

// How many tensors ahead a header is asked for: longer than memory takes to answer, few enough to be under way at once.
constexpr size_t headers_ahead = 12;

inline void prefetch_bytes(const void* address, size_t numel) {
  for (size_t offset = 0; offset < numel; offset += 64) __builtin_prefetch(static_cast<const char*>(address) + offset);
}

inline void prefetch_header(const at::Tensor& tensor) {
  if (tensor.defined()) prefetch_bytes(tensor.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
}

// Of a tensor whose own header is there already: that of its memory.
inline void prefetch_storage(const at::Tensor& tensor) {
  if (tensor.defined() && tensor.has_storage())
    __builtin_prefetch(tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
}

// Asks for the headers of tensors[i + 2 * headers_ahead] and of the memory of tensors[i + headers_ahead].
inline void prefetch_ahead(const std::vector<at::Tensor>& tensors, size_t i) {
  if (i + 2 * headers_ahead < tensors.size()) prefetch_header(tensors[i + 2 * headers_ahead]);
  if (i + headers_ahead < tensors.size()) prefetch_storage(tensors[i + headers_ahead]);
}

}  // namespace largebatch
