// Tensors' headers: what a tensor is, apart from its elements.
//
// A step moves more memory than the caches hold, so the next one finds every header in memory again, and each costs
// some hundred nanoseconds of waiting if it is only asked for when it is needed.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

#include "inlining.h"

namespace largebatch {

// How many tensors ahead a header is asked for: longer than memory takes to answer, few enough to be under way at once.
constexpr size_t headers_ahead = 12;

LARGEBATCH_INLINE void prefetch_bytes(const void* address, size_t numel) {
  const char* const first = static_cast<const char*>(address);
  for (size_t offset = 0; offset + 1 < numel; offset += 64) __builtin_prefetch(first + offset);
  __builtin_prefetch(first + numel - 1);  // on a line of its own if the address is not a line's
}

LARGEBATCH_INLINE void prefetch_header(const at::Tensor& tensor) {
  if (tensor.defined()) prefetch_bytes(tensor.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
}

// Of a tensor whose own header is there already: that of its memory.
LARGEBATCH_INLINE void prefetch_storage(const at::Tensor& tensor) {
  if (tensor.defined() && tensor.has_storage())
    prefetch_bytes(tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl(), sizeof(c10::StorageImpl));
}

// Likewise: what autograd knows of it, its gradient among it.
LARGEBATCH_INLINE void prefetch_autograd(const at::Tensor& tensor) {
  prefetch_bytes(tensor.unsafeGetTensorImpl()->autograd_meta(), 64);
}

}  // namespace largebatch
